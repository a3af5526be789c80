"""Triton kernels of the vocoder's residual blocks: dilated convolutions on tensor cores, snake and residual fused.

Knows tensors only. Channels are innermost, [B, L, C]. With SPLIT a float32 value travels as two bfloat16 numbers, its
rounding and the rest, and a product is the sum of three: close to float32 (relative error about 1e-5) at a third of
the speed of bfloat16. Without it values travel as one float16, as precise as TF32. Row b has `lengths[b]` valid
samples: programs past them return at once, loads past them give zero and nothing is stored there.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: `fused_vocoder.py` says so before anything here is called
    triton = tl = None


def _jit(function):
    """Compiled once for all convolution sizes."""
    general = [name for name in ("TAPS", "DILATION", "SCALE") if name in function.__code__.co_varnames]
    return function if triton is None else triton.jit(function, do_not_specialize=general)


@_jit
def _snake(x, alpha):
    """x + sin(alpha x)^2 / alpha. The square has the period pi: the sine is taken within half of it."""
    angle = x * alpha
    turns = tl.floor(angle * 0.3183098861837907 + 0.5)
    angle = angle - turns * 3.140625
    angle = angle - turns * 0.0009670257568359375
    angle = angle - turns * 6.277114152908325e-07
    square = angle * angle  # the sine's series up to angle^11, exact to 6e-8 there
    series = 1 / 362880 - square * (1 / 39916800)
    series = 1 / 120 - square * (1 / 5040 - square * series)
    sine = angle * (1 - square * (1 / 6 - square * series))
    return x + sine * sine / (alpha + 1e-9)


@_jit
def _store_parts(value, hi, lo, at, mask, SPLIT: tl.constexpr):
    first = value.to(hi.dtype.element_ty)
    tl.store(hi + at, first, mask=mask)
    if SPLIT:
        tl.store(lo + at, (value - first.to(tl.float32)).to(lo.dtype.element_ty), mask=mask)


@_jit
def snake_kernel(x, alpha, hi, lo, lengths, L, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr,
                 SPLIT: tl.constexpr):  # fmt: skip
    """Parts of snake(x), x float32 [B, L, C]. Grid: L / BM, B."""
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    t, c = start + tl.arange(0, BM), tl.arange(0, CP)
    mask = (t < length)[:, None] & (c < C)[None, :]
    at = (b * L + t[:, None]) * C + c[None, :]
    value = _snake(tl.load(x + at, mask=mask, other=0.0), tl.load(alpha + c, mask=c < C, other=1.0)[None, :])
    _store_parts(value, hi, lo, at, mask, SPLIT)


@_jit
def wave_conv_kernel(hi, lo, w_hi, w_lo, bias, residual, mix, alpha, out, out_hi, out_lo, lengths, L,
                     TAPS, DILATION, SCALE, C: tl.constexpr, RES: tl.constexpr, MIX: tl.constexpr,
                     OUT: tl.constexpr, NEXT: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y = convolution of the parts + bias [+ residual]; w [TAPS, C, C] with the output innermost.

    OUT: stores y * SCALE [+ mix] in float32. NEXT: stores the parts of snake(y). Grid: L / BM, C / BN, B.
    """
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + b)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    t = start + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    pieces: tl.constexpr = C // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, TAPS * pieces):
        tap = step // pieces
        channel = (step % pieces) * BK + k
        s = t + (tap - TAPS // 2) * DILATION
        inside = ((s >= 0) & (s < length))[:, None]
        at = (b * L + s[:, None]) * C + channel[None, :]
        weight_at = (tap * C + channel[:, None]) * C + n[None, :]
        a = tl.load(hi + at, mask=inside, other=0.0)
        w = tl.load(w_hi + weight_at)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        if SPLIT:
            acc = tl.dot(a, tl.load(w_lo + weight_at), acc, input_precision="ieee")
            acc = tl.dot(tl.load(lo + at, mask=inside, other=0.0), w, acc, input_precision="ieee")
    mask = (t < length)[:, None]
    at = (b * L + t[:, None]) * C + n[None, :]
    y = acc + tl.load(bias + n)[None, :]
    if RES:
        y += tl.load(residual + at, mask=mask, other=0.0)
    if OUT:
        value = y * SCALE
        if MIX:
            value += tl.load(mix + at, mask=mask, other=0.0)
        tl.store(out + at, value, mask=mask)
    if NEXT:
        _store_parts(_snake(y, tl.load(alpha + n)[None, :]), out_hi, out_lo, at, mask, SPLIT)
