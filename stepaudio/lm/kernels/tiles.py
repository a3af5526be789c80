"""Block sizes of the linear kernels: one explicit rule per kernel, and the other choices that a tuning run tries.

The rules are for an H200 (132 multiprocessors); elsewhere they are correct, only perhaps not the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from stepaudio.lm.kernels.quantise import WORD_BITS, Packed

_BLOCKS_WANTED = 4 * 132  # enough for every multiprocessor to overlap a few
_forced: list[GemvTile | SkinnyTile] = []


class GemvTile(NamedTuple):
    """A block of the matrix-vector kernels."""

    rows: int  # weight rows of a block
    chunks: int  # 16-byte pieces along K per step
    vector: int  # numbers in a piece (int4: words)
    warps: int


class SkinnyTile(NamedTuple):
    """A block of the kernel for few rows."""

    rows: int  # rows of x, filled up to a power of two
    columns: int  # weight rows
    step: int  # numbers of K per step
    split: int  # parts of K that different blocks sum
    warps: int
    stages: int


def gemv_tile(packed: Packed, pair: bool) -> GemvTile:
    """Sizes for one row of x. `pair`: gate and up rows in one block."""
    if _forced and isinstance(_forced[-1], GemvTile):
        return _forced[-1]
    vector, numbers = _piece(packed)
    warps = next((w for w in (4, 2) if _share_busy(packed.columns, 32 * numbers * w) > 0.9), 1)
    rows = 4 if packed.rows <= 8 * 1024 or packed.precision in WORD_BITS else 8  # words need the registers
    return GemvTile(rows, 32 * warps, vector, warps)


def _piece(packed: Packed) -> tuple[int, int]:
    """What a thread loads at once, in elements of the stored tensor and in weights: 16 bytes, 8 for fp8.

    fp8 stays at 8 weights because those meet 16 bytes of activations; 16 would have to pass through shared memory.
    """
    if packed.precision in WORD_BITS:
        return 4, 128 // WORD_BITS[packed.precision]
    vector = min(8, 16 // packed.data.element_size())
    return vector, vector


def _share_busy(columns: int, step: int) -> float:
    """The share of the threads that have work, over all steps along K."""
    return columns / (-(-columns // step) * step)


def skinny_tile(packed: Packed, rows: int) -> SkinnyTile:
    """Sizes for 2 to 64 rows of x."""
    if _forced and isinstance(_forced[-1], SkinnyTile):
        return _forced[-1]
    height = max(16, 1 << (rows - 1).bit_length())
    step = {"bfloat16": 128, "int8": 64, "fp8": 256, "int4": 128}[packed.precision]
    columns = 64 if packed.rows >= 4096 else 32
    blocks, steps = -(-packed.rows // columns), -(-packed.columns // step)
    split = 1
    while split < 8 and blocks * split * 2 <= _BLOCKS_WANTED and steps >= 8 * split:
        split *= 2
    return SkinnyTile(height, columns, step, split, 4, 4 if height <= 32 else 3)


def gemv_choices(packed: Packed) -> list[GemvTile]:
    """What a tuning run tries for one row."""
    vector, _ = _piece(packed)
    return [GemvTile(rows, 32 * warps, vector, warps) for rows in (2, 4, 8, 16) for warps in (1, 2, 4, 8)]


def skinny_choices(packed: Packed, rows: int) -> list[SkinnyTile]:
    """What a tuning run tries for few rows."""
    usual = skinny_tile(packed, rows)
    steps = (usual.step,) if packed.precision in WORD_BITS else (usual.step // 2, usual.step)
    return [
        SkinnyTile(usual.rows, columns, step, split, warps, stages)
        for columns in (32, 64)
        for step in steps
        for split in (1, 4)
        for warps, stages in ((4, 3), (4, 5))
    ]


@contextmanager
def forced(tile: GemvTile | SkinnyTile) -> Iterator[None]:
    """Every launch inside takes this tile."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()
