"""Weights -> `FusedStep1` on a device, tensor by tensor, fused, split and quantised on the way.

`load_fused` streams the shards of a release folder; `random_fused` makes weights of the same shapes for measuring.
Host memory holds one block of a file at a time, the device at most one projection more than the result. Knows
nothing about generation; the eager `load.py` is the oracle.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stepaudio.lm.attention import alibi_slopes
from stepaudio.lm.fused import DenseLinear, FusedLayer, FusedStep1, Projection
from stepaudio.lm.fused_plan import (
    DENSE,
    PROJECTIONS,
    Part,
    check_fits,
    describe,
    layer_parts,
    outer_parts,
    part_precision,
    plan_rank,
)
from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.kernels.linear import quantise
from stepaudio.lm.kernels.workspace import Workspace
from stepaudio.lm.load import check_weights
from stepaudio.lm.modeling import ALIBI_DTYPES, Step1Config
from stepaudio.lm.shards import weight_map
from tokenizer.errors import CheckpointError

BLOCK_BYTES = 64 * 2**20  # read at once
_DELAY = 2.0  # seconds before a bar is shown
_PERIOD = 4_194_301  # a prime: no two rows of a random matrix are equal
_STEP = 1_640_531_527  # between the starts of two random tensors
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where weights come from."""

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Part of a stored tensor, of any device and float type."""
        ...


class ShardSource:
    """Reads blocks of the safetensors files of a folder; the two files last read stay open."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._files = weight_map(folder)
        self._open = functools.lru_cache(maxsize=2)(lambda path: safe_open(path, framework="pt", device="cpu"))

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """A view of the mapped file. Raises CheckpointError if it cannot be read."""
        path = self._files[name]
        try:
            stored = self._open(path).get_slice(name)
            block = stored[rows] if columns is None else stored[rows, columns]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}): download it again") from None
        if not block.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {str(block.dtype)[6:]} numbers, not plain weights")
        return block


class RandomSource:
    """Weights of a normal distribution with deviation 1 / sqrt(columns), norms of one: activations stay finite.

    One random block serves every tensor, each from a start of its own, so 130 billion weights take seconds. A share
    of a tensor is that share of the whole, whatever the number of ranks.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self._shapes = geometry.weight_shapes()
        self._starts = {name: index * _STEP % _PERIOD for index, name in enumerate(self._shapes)}
        matrices = [shape for shape in self._shapes.values() if len(shape) == 2]
        most = max(min(rows, _block_rows(width, dtype)) * width for rows, width in matrices)
        generator = torch.Generator(device).manual_seed(seed)
        block = torch.randn(_PERIOD, generator=generator, device=device).to(dtype)
        self._numbers = block.repeat(-(-most // _PERIOD) + 1)

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        if columns is None:
            return torch.ones(rows.stop - rows.start, dtype=self._numbers.dtype, device=self._numbers.device)
        width = self._shapes[name][1]
        first = (self._starts[name] + rows.start * width) % _PERIOD
        block = self._numbers[first : first + (rows.stop - rows.start) * width].view(-1, width)
        return block[:, columns] * width**-0.5


def load_fused(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    precision: str = DENSE,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> FusedStep1:
    """The share of rank `rank` of `world` of a release folder's model; each rank reads its own part of the files.

    precision  "bfloat16" leaves the weights in `dtype`; "int8", "fp8", "int4" quantise the projections
    progress   on rank 0, the memory plan of a CUDA device and, if it takes long, a bar that counts bytes, on stderr
    The plan is logged in any case, before a byte of weights is read. Raises CheckpointError for files that are
    missing, cut off, packed already or of other shapes than config.json describes; RequestError for a split or a
    precision that is not possible, or more than the device has free, with what would fit. Under tensor parallelism
    `reduce` and `gather` are left to the caller.
    """
    config = read_config(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{Path(folder)}: the weights are packed already: use --engine eager, or plain weights")
    geometry = Geometry.from_config(config)
    progress = progress and rank == 0
    announce(Path(folder).resolve().name, geometry, torch.device(device), dtype, precision, world, progress)
    check_weights(folder, geometry)
    source = ShardSource(folder)
    model = _build(geometry, source, torch.device(device), dtype, precision, rank, world, progress)
    model.eps = float(config.get("rms_norm_eps", Step1Config.rms_norm_eps))
    model.alibi_dtype = ALIBI_DTYPES[Step1Config.from_dict(config).alibi_dtype]
    return model


def random_fused(
    geometry: Geometry,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    precision: str = DENSE,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
) -> FusedStep1:
    """A model of random weights made on the device, for measuring; raises RequestError as `load_fused` does."""
    announce("random weights", geometry, torch.device(device), dtype, precision, world)
    source = RandomSource(geometry, device, dtype, seed)
    return _build(geometry, source, torch.device(device), dtype, precision, rank, world, progress=False)


def announce(
    name: str,
    geometry: Geometry,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    world: int,
    aloud: bool = False,
) -> None:
    """Logs the memory plan of one rank, or prints it; RequestError if it does not fit the CUDA device."""
    plan = plan_rank(geometry, precision, dtype.itemsize, world)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    _log.info(describe(plan, name, free))
    if free is not None:
        if aloud:
            tqdm.write(describe(plan, name, free), file=sys.stderr)
        check_fits(geometry, plan, free, dtype.itemsize)


@torch.inference_mode(False)
@torch.no_grad()
def _build(
    geometry: Geometry,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    rank: int,
    world: int,
    progress: bool,
) -> FusedStep1:
    """Every part of the rank, in the order of the release's files."""
    outer = outer_parts(geometry, rank, world)
    layers = [layer_parts(geometry, index, rank, world) for index in range(geometry.num_hidden_layers)]
    total = dtype.itemsize * sum(part.elements for part in (*outer, *(part for layer in layers for part in layer)))
    with _bar(total) if progress else nullcontext() as bar:

        def made(part: Part) -> Any:
            whole = _assemble(part, source, device, dtype)
            if bar is not None:
                bar.update(whole.nbytes)
            matrix = part.field in PROJECTIONS
            return _projection(whole, part_precision(part.field, precision)) if matrix else whole

        embed = made(outer[0])
        fused = [FusedLayer(**{part.field: made(part) for part in layer}) for layer in layers]
        norm, head = made(outer[1]), made(outer[2])
    heads = geometry.num_attention_heads // world
    if device.type == "cuda" and precision != DENSE:
        torch.cuda.empty_cache()  # what was needed to quantise
    return FusedStep1(
        geometry=geometry,
        embed=embed,
        layers=fused,
        norm=norm,
        head=head,
        heads=heads,
        groups=geometry.num_attention_groups // world,
        slopes=alibi_slopes(geometry.num_attention_heads, device)[rank * heads : (rank + 1) * heads],
        workspace=Workspace(device) if device.type == "cuda" else None,
    )


def _bar(total: int) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=_DELAY)


def _assemble(part: Part, source: Source, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A part as one tensor on the device, filled block by block."""
    whole = torch.empty(part.shape, dtype=dtype, device=device)
    at = 0
    for piece in part.pieces:
        step = _block_rows(piece.width, dtype)
        for first in range(piece.rows.start, piece.rows.stop, step):
            rows = slice(first, min(first + step, piece.rows.stop))
            target = whole[at : at + rows.stop - rows.start]
            target.copy_(source.read(piece.name, rows, piece.columns))
            at += len(target)
    whole[at:].zero_()
    return whole


def _block_rows(width: int, dtype: torch.dtype) -> int:
    """Rows of a stored matrix of so many columns that are read at once."""
    return max(1, BLOCK_BYTES // (width * dtype.itemsize))


def _projection(weight: Tensor, precision: str) -> Projection:
    return DenseLinear(weight) if precision == DENSE else quantise(weight, precision)
