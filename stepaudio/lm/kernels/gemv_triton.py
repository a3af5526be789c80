"""One activation row times a weight matrix, read once and in whole 16-byte pieces; the Triton side of `linear.py`.

A block owns BN weight rows and walks along K in CHUNKS pieces of VEC neighbours, one piece per thread and step, so
that sums stay inside a thread until the end. Norm before, SiLU x gate or residual after are part of the same launch.
With EARLY the first weights are fetched while the predecessor still runs, and only then its result is waited for.

Legend: K in features, N rows of the result, BN rows of a block (for PAIR: gate and up rows in turns, 2 per result).
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, RUF005
from __future__ import annotations

from stepaudio.lm.kernels.jit import jit, tl, tl_cuda


@jit
def _rows_of_block(N, BN: tl.constexpr, PAIR: tl.constexpr):
    """Weight rows of this block, int64 [BN]; rows beyond the matrix repeat its last one."""
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    if PAIR:
        return (tl.minimum(index // 2, N - 1) + (index % 2) * N).to(tl.int64)
    return tl.minimum(index, N - 1).to(tl.int64)


@jit
def _inverse_rms(x, offsets, eps, K: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps), rounded to the dtype of x, as float32; `offsets` are a tile of 0..BK-1."""
    squares = tl.zeros(offsets.shape, tl.float32)
    for start in tl.static_range(0, K, BK):
        part = tl.load(x + start + offsets, mask=start + offsets < K, other=0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps).to(x.dtype.element_ty).to(tl.float32)


@jit
def _activation(x, norm, k, inverse, K: tl.constexpr, NORM: tl.constexpr):
    """x at the places k, float32; with NORM normalised and rounded as `pointwise.rms_norm` does."""
    part = tl.load(x + k, mask=k < K, other=0)
    if NORM:
        scale = tl.load(norm + k, mask=k < K, other=0).to(tl.float32)
        rounded = (part.to(tl.float32) * inverse).to(part.dtype).to(tl.float32)
        part = (rounded * scale).to(part.dtype)
    return part.to(tl.float32)


@jit
def _finish(total, residual, out, N, BN: tl.constexpr, RESIDUAL: tl.constexpr, PAIR: tl.constexpr):
    """Rounds float32 sums [BN] to the dtype of `out`, applies SiLU x gate or the residual, and stores them."""
    result = total.to(out.dtype.element_ty)
    if PAIR:
        gate, up = tl.split(tl.reshape(result, [BN // 2, 2]))
        gate = gate.to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(result.dtype).to(tl.float32)
        result = (active * up.to(tl.float32)).to(result.dtype)
        columns = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    else:
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if RESIDUAL:
        before = tl.load(residual + columns, mask=columns < N, other=0)
        result = (before.to(tl.float32) + result.to(tl.float32)).to(result.dtype)
    tl.store(out + columns, result, mask=columns < N)


@jit
def _weights(here, offsets, start, END: tl.constexpr):
    """The tile of weights from `start` on; zeros from END on. Read once, so the first to leave the caches."""
    return tl.load(here + start, mask=(offsets < END - start)[:, None, :], other=0, eviction_policy="evict_first")


@jit
def _float32(tile, FP8: tl.constexpr):
    if FP8:
        tile = tile.to(tl.float8e4nv, bitcast=True)
    return tile.to(tl.float32)


@jit
def gemv(
    x,
    weight,
    scale,
    norm,
    residual,
    out,
    N,
    stride,
    eps,
    K: tl.constexpr,
    BN: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    FP8: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PAIR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [N] = x [K] by weight [N, K] (2 N rows for PAIR) of floats, or (FP8) of fp8 bytes with a scale per row."""
    BK: tl.constexpr = CHUNKS * VEC
    STEPS: tl.constexpr = (K + BK - 1) // BK
    AHEAD: tl.constexpr = STEPS if STEPS <= 4 else 2  # tiles that are fetched before anything else
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    rows = _rows_of_block(N, BN, PAIR)
    offsets = tl.arange(0, CHUNKS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    here = weight + (rows * stride)[None, :, None] + offsets[:, None, :]
    ahead = ()
    for step in tl.static_range(AHEAD):
        ahead = ahead + (_weights(here, offsets, step * BK, K),)
    if EARLY:
        tl_cuda.gdc_wait()
    inverse = 1.0
    if NORM:
        inverse = _inverse_rms(x, offsets, eps, K, BK)
    sums = tl.zeros([CHUNKS, BN], tl.float32)
    if STEPS == AHEAD:
        for step in tl.static_range(STEPS):
            part = _activation(x, norm, step * BK + offsets, inverse, K, NORM)
            sums += tl.sum(_float32(ahead[step], FP8) * part[:, None, :], 2)
    else:
        now, then = ahead[0], ahead[1]
        for step in tl.range(0, STEPS, loop_unroll_factor=2):
            later = _weights(here, offsets, (step + 2) * BK, K)
            part = _activation(x, norm, step * BK + offsets, inverse, K, NORM)
            sums += tl.sum(_float32(now, FP8) * part[:, None, :], 2)
            now, then = then, later
    total = tl.sum(sums, 0)
    if FP8:
        total *= tl.load(scale + rows)
    _finish(total, residual, out, N, BN, RESIDUAL, PAIR)


@jit
def _field(words, field: tl.constexpr, part, BITS: tl.constexpr):
    """Field q of each word int32 [CHUNKS, BN, 4] times part [CHUNKS, 4], over 2^60.

    The bits of a field that lie below a float's exponent are that float, a denormal one of exactly q * 2^(place - 149):
    one bit operation instead of a conversion. `part` carries the power of two that brings it back into range.
    """
    LOW: tl.constexpr = 20 // BITS  # fields that lie low enough as they are
    DOWN: tl.constexpr = (16 if BITS == 8 else 12) if field >= LOW else 0
    PLACE: tl.constexpr = field * BITS - DOWN
    bits = (words >> DOWN) & (((1 << BITS) - 1) << PLACE)
    return bits.to(tl.float32, bitcast=True) * (part * (2.0 ** (149 - 60 - PLACE)))[:, None, :]


@jit
def _fields(words, x, norm, k, inverse, K: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr):
    """Sums over the fields of words times x, over 2^60, and of x alone: [CHUNKS, BN] and [CHUNKS]."""
    sums = tl.zeros([words.shape[0], words.shape[1], words.shape[2]], tl.float32)
    plain = tl.zeros([words.shape[0], words.shape[2]], tl.float32)
    for field in tl.static_range(32 // BITS):
        part = _activation(x, norm, k + 16 * field, inverse, K, NORM)
        plain += part
        sums += _field(words, field, part, BITS)
    return tl.sum(sums, 2), tl.sum(plain, 1)


@jit
def _group_scales(there, places, start, END: tl.constexpr, BITS: tl.constexpr):
    """Scale and offset of each chunk's group, packed int32 [CHUNKS, BN]; 0 for 8 bits, which have one per row."""
    if BITS == 4:
        packed = tl.load(there + start // 16, mask=(places < END - start)[:, None], other=0)
    else:
        packed = tl.zeros([1, 1], tl.int32)
    return packed


@jit
def _scaled(products, plain, packed, BITS: tl.constexpr):
    """What one step adds to the sums [CHUNKS, BN]."""
    products *= 1152921504606846976.0  # 2^60
    if BITS == 4:
        factor = (packed << 16).to(tl.float32, bitcast=True)
        added = products * factor + plain[:, None] * (packed & -65536).to(tl.float32, bitcast=True)
    else:
        added = products - plain[:, None] * 128.0
    return added


@jit
def gemv_words(
    x,
    weight,
    scale,
    norm,
    residual,
    out,
    N,
    stride,
    scale_stride,
    eps,
    K: tl.constexpr,
    BN: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PAIR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `gemv` for weights in int32 words (`quantise.py`): 4 bits with a scale per group, or 8 with one per row.

    A run is 16 words; a field of a run's words holds 16 numbers that follow each other along K.
    """
    RUN: tl.constexpr = 16 * 32 // BITS  # numbers of a run
    BW: tl.constexpr = CHUNKS * VEC
    WORDS: tl.constexpr = (K + RUN - 1) // RUN * 16
    STEPS: tl.constexpr = (WORDS + BW - 1) // BW
    AHEAD: tl.constexpr = STEPS if STEPS <= 4 else 2
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    rows = _rows_of_block(N, BN, PAIR)
    chunk = tl.arange(0, CHUNKS)
    offsets = chunk[:, None] * VEC + tl.arange(0, VEC)[None, :]
    places = (chunk // (16 // VEC) * RUN + chunk % (16 // VEC) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    here = weight + (rows * stride)[None, :, None] + offsets[:, None, :]
    there = scale + (rows * scale_stride)[None, :] + (chunk // (16 // VEC))[:, None]
    ahead, scales = (), ()
    for step in tl.static_range(AHEAD):
        ahead = ahead + (_weights(here, offsets, step * BW, WORDS),)
        scales = scales + (_group_scales(there, chunk * VEC, step * BW, WORDS, BITS),)
    if EARLY:
        tl_cuda.gdc_wait()
    inverse = 1.0
    if NORM:
        wide = tl.arange(0, CHUNKS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        inverse = _inverse_rms(x, wide, eps, K, CHUNKS * 8)
    sums = tl.zeros([CHUNKS, BN], tl.float32)
    if STEPS == AHEAD:
        for step in tl.static_range(STEPS):
            k = step * (BW // 16 * RUN) + places
            products, plain = _fields(ahead[step], x, norm, k, inverse, K, BITS, NORM)
            sums += _scaled(products, plain, scales[step], BITS)
    else:
        now, then = ahead[0], ahead[1]
        scale_now, scale_then = scales[0], scales[1]
        for step in tl.range(0, STEPS):
            later = _weights(here, offsets, (step + 2) * BW, WORDS)
            scale_later = _group_scales(there, chunk * VEC, (step + 2) * BW, WORDS, BITS)
            k = step * (BW // 16 * RUN) + places
            products, plain = _fields(now, x, norm, k, inverse, K, BITS, NORM)
            sums += _scaled(products, plain, scale_now, BITS)
            now, then = then, later
            scale_now, scale_then = scale_then, scale_later
    total = tl.sum(sums, 0)
    if BITS == 8:
        total *= tl.load(scale + rows)
    _finish(total, residual, out, N, BN, RESIDUAL, PAIR)
