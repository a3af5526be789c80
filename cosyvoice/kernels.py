"""Triton kernels of the flow's velocity estimator: few launches, nothing computed where there is only padding.

Knows tensors only. Rows lie one after the other, [R, T, C] with C innermost; row r has `lengths[r]` valid frames.
A program whose frames are all padding returns at once, a load outside the valid frames gives zero, and what a kernel
leaves at padding has no meaning. Sums are fp32, results are rounded where the plain modules round.
GroupNorm is split: the convolution before it writes the mean and the squared deviation of its tile, per group, and
whoever reads the normalised value joins them (Chan's formula). `PDL`: programmatic dependent launch of Hopper.
Legend: R rows, T frames, C channels, G groups, M / N / K of a matrix product.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: `fused.py` says so before anything here is called
    triton = tl = None

GROUPS = 8


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@_jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@_jit
def _mish(x):
    """x tanh(softplus(x)); with e = exp(x) the tanh is (e e + 2 e) / (e e + 2 e + 2)."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return tl.where(x > 20.0, x, x * (n / (n + 2.0)))


@_jit
def _group_of(C: tl.constexpr, G: tl.constexpr, width: tl.constexpr, first):
    """[C, G]: 1 where channel first + c lies in group g."""
    channel = (first + tl.arange(0, C)) // width
    return (channel[:, None] == tl.arange(0, G)[None, :]).to(tl.float32)


@_jit
def _moments(stats, r, length, BS: tl.constexpr, NT: tl.constexpr, G: tl.constexpr, width: tl.constexpr):
    """Mean and 1 / deviation of each group, [G], from the parts of row r."""
    tile = tl.arange(0, NT)[:, None]
    group = tl.arange(0, G)[None, :]
    count = tl.minimum(tl.maximum(length - tile * BS, 0), BS).to(tl.float32)  # [NT, 1] frames of each tile
    at = stats + ((r * NT + tile) * G + group) * 2
    real = (count > 0) & (group >= 0)
    means = tl.load(at, mask=real, other=0.0)
    squares = tl.load(at + 1, mask=real, other=0.0)
    frames = length.to(tl.float32)
    mean = tl.sum(means * count, axis=0) / frames
    apart = means - mean[None, :]
    square = tl.sum(squares + count * width * apart * apart, axis=0) / (frames * width)
    return mean, 1.0 / tl.sqrt(square + 1e-5)


@_jit
def _spread(mean, rstd, first, G: tl.constexpr, width: tl.constexpr, C: tl.constexpr):
    """Values of groups [G] -> those of the channels first .. first + C - 1, [C]."""
    member = _group_of(C, G, width, first)
    return tl.sum(member * mean[None, :], axis=1), tl.sum(member * rstd[None, :], axis=1)


@_jit
def linear_kernel(x, w, bias, out, residual, gain, shift, lengths, T,
                  K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  LN: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, RES: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """out = [residual +] [gelu] ([norm] x @ w^T [+ bias]); x [R, T, K], w [N, K]. Grid: T / BM, N / BN, R."""
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + r)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    t = start + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    valid = t < length
    row = r * T + t
    acc = tl.zeros((BM, BN), tl.float32)
    if LN:
        k = tl.arange(0, K)
        weight = tl.load(w + n[None, :] * K + k[:, None])
        scale, offset = tl.load(gain + k).to(tl.float32), tl.load(shift + k).to(tl.float32)
        _begin(PDL)
        a = tl.load(x + row[:, None] * K + k[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        a = a - tl.sum(a, axis=1)[:, None] / K
        a = a / tl.sqrt(tl.sum(a * a, axis=1)[:, None] / K + 1e-5)
        a = (a * scale[None, :] + offset[None, :]).to(w.dtype.element_ty)
        acc = _dot(a, weight, acc)
    else:
        _begin(PDL)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            a = tl.load(x + row[:, None] * K + k[None, :], mask=valid[:, None], other=0.0)
            weight = tl.load(w + n[None, :] * K + k[:, None])
            acc = _dot(a, weight, acc)
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    if GELU:
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if RES:
        before = tl.load(residual + row[:, None] * N + n[None, :], mask=valid[:, None], other=0.0)
        acc = acc.to(out.dtype.element_ty).to(tl.float32) + before.to(tl.float32)
    tl.store(out + row[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None])


@_jit
def attention_kernel(qkv, out, lengths, T, scale, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Attention within each row; qkv [R, T, 3 H D] -> out [R, T, H D]; `scale` holds log2(e). Grid: T / BM, H, R."""
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + r)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    h = tl.program_id(1)
    t = start + tl.arange(0, BM)
    d = tl.arange(0, D)
    stride = 3 * H * D
    base = qkv + r * T * stride + h * D
    _begin(PDL)
    q = tl.load(base + t[:, None] * stride + d[None, :], mask=(t < length)[:, None], other=0.0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for first in range(0, length, BN):
        s = first + tl.arange(0, BN)
        there = s < length
        k = tl.load(base + H * D + s[None, :] * stride + d[:, None], mask=there[None, :], other=0.0)
        score = _dot(q, k, tl.zeros((BM, BN), tl.float32)) * scale
        score = tl.where(there[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - new[:, None])
        old = tl.exp2(top - new)
        v = tl.load(base + 2 * H * D + s[:, None] * stride + d[None, :], mask=there[:, None], other=0.0)
        total = total * old + tl.sum(p, axis=1)
        acc = _dot(p.to(v.dtype), v, acc * old[:, None])
        top = new
    acc = acc / total[:, None]
    at = out + (r * T + t[:, None]) * (H * D) + h * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < length)[:, None])


@_jit
def conv_kernel(x, x2, w, bias, extra, time, gain, shift, stats_in, out, stats_out, lengths, lengths_in, T, T_IN, T_OUT,
                XROWS, K: tl.constexpr, KP: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
                UP: tl.constexpr, TWO: tl.constexpr, EXTRA: tl.constexpr, NORM: tl.constexpr, STATS: tl.constexpr,
                G: tl.constexpr, BS: tl.constexpr, NT_IN: tl.constexpr, NT_OUT: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A convolution over frames as TAPS matrix products. Grid: T / BM, N / BN (twice that for UP), R.

    x [XROWS, T_IN, K] is read by row r % XROWS; with TWO, x2 holds the second half of the input channels.
    NORM: the input becomes mish(group norm(x)) + time, from the parts in stats_in. EXTRA [R, T, N] is added (it
    holds the bias then), else bias. STATS: writes the parts of the GroupNorm that follows. UP: a transposed
    convolution (kernel 4, stride 2, padding 1): frames 2 t and 2 t + 1 of out are made by programs of their own.
    w [SOURCES, (2 if UP) N, TAPS, K].
    """
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + r)
    length_in = tl.load(lengths_in + r)
    start = tl.program_id(0) * BM
    if start * (2 if UP else 1) >= length:
        return
    t = start + tl.arange(0, BM)
    column = tl.program_id(1) * BN
    parity = column // N  # 0 unless UP
    n = column % N + tl.arange(0, BN)
    k = tl.arange(0, KP)
    x_row = (r % XROWS) * T_IN
    _begin(PDL)
    if NORM:
        mean, rstd = _moments(stats_in, r, length_in, BS, NT_IN, G, K // G)
        mean, rstd = _spread(mean, rstd, 0, G, K // G, KP)
        scale, offset = tl.load(gain + k).to(tl.float32) * rstd, tl.load(shift + k).to(tl.float32)
        later = tl.load(time + k).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in range(TAPS):
        s = (t + parity - tap) if UP else (t * STRIDE + tap - TAPS // 2)
        inside = (s >= 0) & (s < length_in)
        mask = inside[:, None] & (k < K)[None, :]
        at = (x_row + s[:, None]) * K + k[None, :]
        weights = w + ((parity * N + n[None, :]) * TAPS + tap) * K + k[:, None]
        a = tl.load(x + at, mask=mask, other=0.0)
        if NORM:
            y = _mish(
                ((a.to(tl.float32) - mean[None, :]) * scale[None, :] + offset[None, :]).to(a.dtype).to(tl.float32)
            )
            a = tl.where(mask, y.to(a.dtype).to(tl.float32) + later[None, :], 0.0).to(a.dtype)
        acc = _dot(a, tl.load(weights, mask=(k < K)[:, None], other=0.0), acc)
        if TWO:
            a = tl.load(x2 + at, mask=mask, other=0.0)
            acc = _dot(a, tl.load(weights + N * TAPS * K, mask=(k < K)[:, None], other=0.0), acc)
    if EXTRA:
        at = (r * T + t[:, None]) * N + n[None, :]
        acc += tl.load(extra + at, mask=(t < length)[:, None], other=0.0).to(tl.float32)
    else:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    y = acc.to(out.dtype.element_ty)
    t_out = t * 2 + parity if UP else t
    valid = t_out < length
    tl.store(out + (r * T_OUT + t_out[:, None]) * N + n[None, :], y, mask=valid[:, None])
    if STATS:
        count = tl.minimum(length - start, BM).to(tl.float32)
        width: tl.constexpr = N // G
        parts: tl.constexpr = BN // width  # groups of this tile
        member = _group_of(BN, parts, width, 0)
        y = tl.where(valid[:, None], y.to(tl.float32), 0.0)
        mean = tl.sum(tl.sum(y, axis=0)[:, None] * member, axis=0) / (count * width)  # [parts]
        apart = tl.where(valid[:, None], y - tl.sum(member * mean[None, :], axis=1)[None, :], 0.0)
        square = tl.sum(tl.sum(apart * apart, axis=0)[:, None] * member, axis=0)
        group = column // width + tl.arange(0, parts)
        at = stats_out + ((r * NT_OUT + tl.program_id(0)) * G + group) * 2
        tl.store(at, mean)
        tl.store(at + 1, square)


@_jit
def merge_kernel(h, stats, gain, shift, x, x2, w, bias, extra, out, lengths, T, XROWS, K: tl.constexpr,
                 KP: tl.constexpr, N: tl.constexpr, TWO: tl.constexpr, EXTRA: tl.constexpr, G: tl.constexpr,
                 BS: tl.constexpr, NT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """out = mish(group norm(h)) + 1x1 convolution of x (and x2): the end of a ResNet block. Grid: T / BM, N / BN, R."""
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + r)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    t = start + tl.arange(0, BM)
    column = tl.program_id(1) * BN
    n = column + tl.arange(0, BN)
    k = tl.arange(0, KP)
    valid = t < length
    mask = valid[:, None] & (k < K)[None, :]
    at = ((r % XROWS) * T + t[:, None]) * K + k[None, :]
    weights = w + n[None, :] * K + k[:, None]
    weight = tl.load(weights, mask=(k < K)[:, None], other=0.0)
    _begin(PDL)
    acc = _dot(tl.load(x + at, mask=mask, other=0.0), weight, tl.zeros((BM, BN), tl.float32))
    if TWO:
        weight = tl.load(weights + N * K, mask=(k < K)[:, None], other=0.0)
        acc = _dot(tl.load(x2 + at, mask=mask, other=0.0), weight, acc)
    place = (r * T + t[:, None]) * N + n[None, :]
    if EXTRA:
        acc += tl.load(extra + place, mask=valid[:, None], other=0.0).to(tl.float32)
    else:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    mean, rstd = _moments(stats, r, length, BS, NT, G, N // G)
    mean, rstd = _spread(mean, rstd, column, G, N // G, BN)
    y = tl.load(h + place, mask=valid[:, None], other=0.0)
    normed = (y.to(tl.float32) - mean[None, :]) * (rstd * tl.load(gain + n).to(tl.float32))[None, :]
    y = _mish((normed + tl.load(shift + n).to(tl.float32)[None, :]).to(y.dtype).to(tl.float32)).to(y.dtype)
    acc = acc.to(y.dtype).to(tl.float32) + y.to(tl.float32)
    tl.store(out + place, acc.to(y.dtype), mask=valid[:, None])


@_jit
def _velocity(h, stats, gain, shift, w, bias, r, t, n, length, T, C: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
              BS: tl.constexpr, NT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """mish(group norm(h)) @ w^T + bias of one row's frames, rounded as the plain module rounds it."""
    means, rstds = _moments(stats, r, length, BS, NT, G, C // G)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, C, BK):
        k = first + tl.arange(0, BK)
        mean, rstd = _spread(means, rstds, first, G, C // G, BK)
        scale, offset = tl.load(gain + k).to(tl.float32) * rstd, tl.load(shift + k).to(tl.float32)
        a = tl.load(h + (r * T + t[:, None]) * C + k[None, :], mask=(t < length)[:, None], other=0.0)
        normed = (a.to(tl.float32) - mean[None, :]) * scale[None, :] + offset[None, :]
        a = _mish(normed.to(a.dtype).to(tl.float32)).to(a.dtype)
        acc = _dot(a, tl.load(w + n[None, :] * C + k[:, None], mask=(n < N)[None, :], other=0.0), acc)
    acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc.to(h.dtype.element_ty).to(tl.float32)


@_jit
def euler_kernel(h, stats, gain, shift, w, bias, x, lengths, T, B, dt, guidance, C: tl.constexpr, N: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, BS: tl.constexpr, NT: tl.constexpr,
                 BM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x [B, T, N] += dt * guided velocity, in place. Rows 0..B-1 of h are conditional, B..2B-1 not. Grid: T / BM, B."""
    r = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + r)
    start = tl.program_id(0) * BM
    if start >= length:
        return
    t, n = start + tl.arange(0, BM), tl.arange(0, BN)
    _begin(PDL)
    with_voice = _velocity(h, stats, gain, shift, w, bias, r, t, n, length, T, C, N, G, BS, NT, BM, BN, BK)
    without = _velocity(h, stats, gain, shift, w, bias, r + B, t, n, length, T, C, N, G, BS, NT, BM, BN, BK)
    at = x + (r * T + t[:, None]) * N + n[None, :]
    mask = (t < length)[:, None] & (n < N)[None, :]
    value = tl.load(at, mask=mask, other=0.0)
    value = value.to(tl.float32) + dt * ((1.0 + guidance) * with_voice - guidance * without)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)
