"""The Triton side of `pointwise.py`. EARLY: launched before the predecessor has ended, so wait for its results."""

# ruff: noqa: ANN001, ANN201, N803
from __future__ import annotations

from stepaudio.lm.kernels.jit import jit, tl, tl_cuda


@jit
def rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row [WIDTH] per block; with ADD, `total` takes x + residual and `normed` the norm of that."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    here = tl.program_id(0).to(tl.int64) * WIDTH + columns
    row = tl.load(x + here, mask=inside, other=0)
    if ADD:
        row = (row.to(tl.float32) + tl.load(residual + here, mask=inside, other=0).to(tl.float32)).to(row.dtype)
        tl.store(total + here, row, mask=inside)
    wide = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps).to(row.dtype).to(tl.float32)
    rounded = (wide * inverse).to(row.dtype).to(tl.float32)
    tl.store(normed + here, (rounded * scale.to(tl.float32)).to(row.dtype), mask=inside)


@jit
def silu_mul(gate_up, out, inner, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK columns of one row: out [inner] from gate_up [2 * inner]."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(gate_up + row * 2 * inner + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + columns, mask=inside, other=0)
    active = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * inner + columns, (active * up.to(tl.float32)).to(up.dtype), mask=inside)
