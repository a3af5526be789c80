"""A few activation rows (up to 64) times a weight matrix on tensor cores, and quantised weights made dense again.

The Triton side of `linear.py`. Blocks own BN columns of the result and one of SPLIT parts of K; the last block of a
column range to finish adds the parts in a fixed order, so results do not depend on timing.

Legend: M rows of x (BM with filling), K in features, N columns of the result, BK numbers of K per step.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
from __future__ import annotations

from stepaudio.lm.kernels.jit import jit, tl, tl_cuda


@jit
def _field(words, field, factor, offset, dtype: tl.constexpr, BITS: tl.constexpr):
    """One field of each word int32 [BN, 16] as its weight rounded to `dtype` (8 bits: without the row's scale)."""
    MASK: tl.constexpr = 2**BITS - 1
    bits = ((words >> (BITS * field)) & MASK) | 0x4B000000  # of the float 2^23 + q
    if BITS == 8:
        return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    return ((bits.to(tl.float32, bitcast=True) - 8388608.0) * factor + offset).to(dtype)


@jit
def _tile(x_row, weight_row, scale_row, first, last, inside, K: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr):
    """float32 [BM, BN]: x [BM, K] by weight [BN, K] over the steps first..last; pointers are to row starts.

    A step is one run of 16 words for 4 and 8 BITS, else BK numbers: 16 bits are floats, 0 stands for fp8 bytes.
    """
    sums = tl.zeros([x_row.shape[0], weight_row.shape[0]], tl.float32)
    dtype: tl.constexpr = x_row.dtype.element_ty
    for step in tl.range(first, last):
        if BITS == 4 or BITS == 8:
            places = tl.arange(0, 16)
            words = tl.load(weight_row[:, None] + step * 16 + places[None, :], eviction_policy="evict_first")
            factor, offset = 0.0, 0.0
            if BITS == 4:
                packed = tl.load(scale_row + step)
                factor = (packed << 16).to(tl.float32, bitcast=True)[:, None]
                offset = (packed & -65536).to(tl.float32, bitcast=True)[:, None]
            for field in tl.static_range(32 // BITS):
                k = step * BK + field * 16 + places
                part = tl.load(x_row[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
                tile = _field(words, field, factor, offset, dtype, BITS)
                sums = tl.dot(part, tl.trans(tile), sums, input_precision="ieee")
        else:
            k = step * BK + tl.arange(0, BK)
            part = tl.load(x_row[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
            tile = tl.load(
                weight_row[:, None] + k[None, :], mask=(k < K)[None, :], other=0, eviction_policy="evict_first"
            )
            if BITS == 0:
                tile = tile.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot(part, tl.trans(tile.to(dtype)), sums, input_precision="ieee")
    return sums


@jit
def _gathered(sums, floats, counter, part, SPLIT: tl.constexpr):
    """Adds the SPLIT tiles [BM, BN] of this column range; True for the block that has the whole sum."""
    SIZE: tl.constexpr = sums.shape[0] * sums.shape[1]
    inner = tl.arange(0, sums.shape[0])[:, None] * sums.shape[1] + tl.arange(0, sums.shape[1])[None, :]
    tl.store(floats + part * SIZE + inner, sums)
    tl.debug_barrier()
    complete = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if complete:
        tl.store(counter, 0)
        sums = tl.zeros(sums.shape, tl.float32)
        for other in tl.static_range(SPLIT):
            sums += tl.load(floats + other * SIZE + inner, cache_modifier=".cg")
    return sums, complete


@jit
def skinny(
    x,
    weight,
    scale,
    residual,
    out,
    floats,
    counters,
    M,
    N,
    x_stride,
    stride,
    scale_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [M, N] = x [M, K] by weight [N, K], plus residual [M, N] where RESIDUAL."""
    STEPS: tl.constexpr = (K + BK - 1) // BK
    PER: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    column_block, part = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BM)
    n = column_block * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    first = part * PER
    last = tl.minimum(first + PER, STEPS)
    sums = _tile(x + m * x_stride, weight + row * stride, scale + row * scale_stride, first, last, m < M, K, BK, BITS)
    complete = True
    if SPLIT > 1:
        mine = floats + column_block.to(tl.int64) * (SPLIT * BM * BN)
        sums, complete = _gathered(sums, mine, counters + column_block, part, SPLIT)
    if complete:
        if BITS == 0 or BITS == 8:
            sums *= tl.load(scale + row)[None, :]
        here = m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        result = sums.to(out.dtype.element_ty)
        if RESIDUAL:
            before = tl.load(residual + here, mask=inside, other=0)
            result = (before.to(tl.float32) + result.to(tl.float32)).to(result.dtype)
        tl.store(out + here, result, mask=inside)


@jit
def dequantise(
    weight,
    scale,
    out,
    N,
    columns,
    stride,
    scale_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [N, columns] from a quantised weight: BN rows and BK columns (4 and 8 BITS: one run) per block."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = row < N
    wide = row.to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    step = tl.program_id(1)
    factor, offset = 0.0, 0.0
    if BITS == 4:
        packed = tl.load(scale + wide * scale_stride + step, mask=inside, other=0)
        factor = (packed << 16).to(tl.float32, bitcast=True)[:, None]
        offset = (packed & -65536).to(tl.float32, bitcast=True)[:, None]
    else:
        row_scale = tl.load(scale + wide, mask=inside, other=0)[:, None]
    if BITS == 0:
        k = step * BK + tl.arange(0, BK)
        both = inside[:, None] & (k < columns)[None, :]
        tile = tl.load(weight + (wide * stride)[:, None] + k[None, :], mask=both, other=0)
        value = tile.to(tl.float8e4nv, bitcast=True).to(tl.float32) * row_scale
        tl.store(out + (wide * columns)[:, None] + k[None, :], value.to(dtype), mask=both)
    else:
        places = tl.arange(0, 16)
        words = tl.load(weight + (wide * stride)[:, None] + step * 16 + places[None, :], mask=inside[:, None], other=0)
        for field in tl.static_range(32 // BITS):
            k = step * BK + field * 16 + places
            value = _field(words, field, factor, offset, tl.float32, BITS)
            if BITS == 8:
                value *= row_scale
            both = inside[:, None] & (k < columns)[None, :]
            tl.store(out + (wide * columns)[:, None] + k[None, :], value.to(dtype), mask=both)
