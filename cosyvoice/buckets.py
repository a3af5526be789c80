"""The shapes that graphs are captured for: few, so that every request falls into one seen before.

Knows numbers only. Padding up to a bucket changes no result, and the fused kernels skip most of it.
"""

from __future__ import annotations

MAX_FRAMES = 4096  # mel frames of one graph (47 s); longer rows run without one
MAX_CELLS = 32_768  # batch times frames of one graph; larger batches keep the device busy by themselves
_CODES_SLACK = 32


def frame_bucket(frames: int) -> int:
    """The smallest bucket that holds so many mel frames: steps of 64, from 512 of 128, from 1536 of 256."""
    step = 64 if frames <= 512 else 128 if frames <= 1536 else 256
    return -(-frames // step) * step


def code_bucket(frames: int) -> int:
    """Places for codes that go with a bucket of frames. There are 2.067 frames to a code; a prompt may have fewer."""
    return frames // 2 + _CODES_SLACK


def batch_bucket(batch: int) -> int:
    """The smallest power of two that holds so many rows."""
    return 1 << (batch - 1).bit_length()


def flow_bucket(batch: int, frames: int, codes: int) -> tuple[int, int, int] | None:
    """(batch, frames, codes) of the graph for a padded batch; None where it should run without one."""
    wide = max(frame_bucket(frames), frame_bucket(2 * max(0, codes - _CODES_SLACK)))
    rows = batch_bucket(batch)
    if wide > MAX_FRAMES or rows * wide > MAX_CELLS:
        return None
    return rows, wide, code_bucket(wide)


def vocoder_bucket(batch: int, frames: int) -> tuple[int, int] | None:
    """(batch, frames) of the graph for a padded batch of mels; None where it should run without one."""
    wide, rows = (32 if frames <= 32 else frame_bucket(frames)), batch_bucket(batch)
    return None if wide > MAX_FRAMES or rows * wide > MAX_CELLS // 2 else (rows, wide)
