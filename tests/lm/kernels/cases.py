"""What the kernels are compared with, and how far they may be off: used by the interpreter's run and by the GPU's.

Every case returns the largest error over its bound, which must be at most 1. Bounds follow from the roundings:
u is the unit roundoff of the dtype (2^-8 bfloat16, 2^-11 float16, 2^-24 float32), sums are float32.
"""

from __future__ import annotations

import torch

from stepaudio.lm.attention import alibi_slopes
from stepaudio.lm.kernels.attention import decode_attention, decode_plain, prefill_attention, prefill_plain
from stepaudio.lm.kernels.linear import Norm, dense_weight, linear
from stepaudio.lm.kernels.pointwise import add_rms_norm, add_rms_norm_plain, silu_mul, silu_mul_plain
from stepaudio.lm.kernels.quantise import pack, unpack

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FLOAT32_SUM = 2.0**-20  # relative to the sum of magnitudes; generous for the lengths tested


def worst(found, expected, bound, name):
    """Prints maximum and mean difference; the largest difference over its bound."""
    assert torch.isfinite(found).all(), name
    difference = (found.double() - expected.double()).abs()
    print(f"{name}: max {difference.max().item():.2e} mean {difference.mean().item():.2e}")
    return (difference / bound).max().item()


def decode_case(device, dtype, lengths, heads, groups, width, capacity, new=False, seed=0):
    """|error| <= 2 u max|v|: one rounding of the weights, one of the result; plus float32 sums and exponentials."""
    random = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    query = torch.randn(batch, heads, width, generator=random).to(device, dtype)
    cache = torch.randn(2, batch, groups, capacity, width, generator=random).to(device, dtype)
    slopes = alibi_slopes(heads).to(device)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    wanted = cache.clone()
    for row, length in enumerate(lengths):
        cache[:, row, :, length:] = torch.nan  # nothing beyond a row's length may be looked at
    newest = None
    if new:
        newest = torch.randn(2, batch, groups, width, generator=random).to(device, dtype)
        for row, length in enumerate(lengths):
            if length:
                wanted[:, row, :, length - 1] = newest[:, row]
                cache[:, row, :, length - 1] = torch.nan
        newest = (newest[0], newest[1])
    keys, values = cache
    found = decode_attention(query, keys, values, sizes, slopes, width**-0.5, new=newest)
    expected = decode_plain(query.double(), *wanted.double(), sizes, slopes, width**-0.5)
    if new:
        for row, length in enumerate(lengths):
            assert torch.equal(cache[:, row, :, :length], wanted[:, row, :, :length])
    bound = (2 * ROUNDOFF[dtype] + 1e-5) * wanted[1].abs().max()
    return worst(found, expected, bound, f"decode {lengths} {heads}/{groups} x {width} {dtype}")


def prefill_case(device, dtype, starts, lengths, rows, heads, groups, width, seed=0):
    """The same bound as `decode_case`."""
    random = torch.Generator().manual_seed(seed)
    batch, capacity = len(starts), max(a + b for a, b in zip(starts, lengths)) + 3
    query = torch.randn(batch, rows, heads, width, generator=random).to(device, dtype)
    cache = torch.randn(2, batch, groups, capacity, width, generator=random).to(device, dtype)
    for row in range(batch):
        cache[:, row, :, starts[row] + lengths[row] :] = 1e4 if dtype == torch.float16 else 1e30
    slopes = alibi_slopes(heads).to(device)
    first, count = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    found = prefill_attention(query, *cache, first, count, slopes, width**-0.5)
    for row in range(batch):
        cache[:, row, :, starts[row] + lengths[row] :] = 0
        assert not found[row, lengths[row] :].any()
    expected = prefill_plain(query.double(), *cache.double(), first, count, slopes, width**-0.5)
    bound = (2 * ROUNDOFF[dtype] + 1e-5) * cache[1].abs().max()
    return worst(found, expected, bound, f"prefill {starts} {lengths} of {rows} {heads}/{groups} x {width} {dtype}")


def linear_case(device, dtype, precision, rows, columns, features, fused=False, seed=0):
    """|error| <= u |y| + sums, and where the weights or a fused norm are rounded, u times the sum of magnitudes."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=random).to(device, dtype)
    weight = (torch.randn(columns, features, generator=random) * features**-0.5).to(device, dtype)
    packed = pack(weight, precision)
    norm = Norm(torch.rand(features, generator=random).to(device, dtype) + 0.5, 1e-5) if fused else None
    residual = torch.randn(rows, columns, generator=random).to(device, dtype) if fused else None
    found = linear(x, packed, norm, residual)
    if norm is not None:
        x = add_rms_norm_plain(x, torch.zeros_like(x), norm.weight, norm.eps)[0]
    expected = x.double() @ unpack(packed, torch.float64).T
    magnitude = x.double().abs() @ unpack(packed, torch.float64).abs().T
    rounded = fused or rows > 8 or (precision != "bfloat16" and rows > 1)  # torch's own product may round parts
    bound = magnitude * (FLOAT32_SUM + (2 * ROUNDOFF[dtype] if rounded else 0)) + ROUNDOFF[dtype] * expected.abs()
    if residual is not None:
        expected = expected + residual.double()
        bound = bound + ROUNDOFF[dtype] * expected.abs()
    name = f"linear {precision} {rows} x {features} -> {columns} {'fused' if fused else ''} {dtype}"
    return worst(found, expected, bound * 1.01 + 1e-30, name)


def silu_case(device, dtype, precision, rows, columns, features, seed=0):
    """SiLU x gate in the product's launch against the same steps apart: three roundings of both factors."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=random).to(device, dtype)
    packed = pack((torch.randn(2 * columns, features, generator=random) * features**-0.5).to(device, dtype), precision)
    expected = silu_mul_plain(x.double() @ unpack(packed, torch.float64).T)
    found = linear(x, packed, silu=True)
    bound = 8 * ROUNDOFF[dtype] * (expected.abs() + 1) + 1e-5
    return worst(found, expected, bound, f"silu {precision} {rows} x {features} -> {columns}")


def pointwise_case(device, dtype, rows, width, seed=0):
    """Equal to the plain form but for a last place where the float32 mean or exponential was off by one."""
    random = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, rows, width, generator=random).to(device, dtype)
    weight = torch.rand(width, generator=random).to(device, dtype)
    found, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, plain_total = add_rms_norm_plain(x, residual, weight, 1e-5)
    assert torch.equal(total, plain_total)
    unit = 2.1 * ROUNDOFF[dtype]
    error = worst(found, expected, unit * 2 * expected.double().abs() + 1e-6, f"norm {rows} x {width} {dtype}")
    both = torch.randn(rows, 2 * width, generator=random).to(device, dtype)
    expected = silu_mul_plain(both)
    bound = unit * 2 * expected.double().abs() + 1e-6
    return max(error, worst(silu_mul(both), expected, bound, f"silu {rows} x {width} {dtype}"))


def dequantise_case(device, dtype, precision, columns, features):
    """The kernel that makes weights dense again gives the oracle's numbers, rounded once."""
    packed = pack(torch.randn(columns, features, generator=torch.Generator().manual_seed(0)).to(device), precision)
    expected = unpack(packed, torch.float64)
    bound = ROUNDOFF[dtype] * expected.abs() * 1.01 + 1e-6
    return worst(dense_weight(packed, dtype), expected, bound, f"dequantise {precision} {columns} x {features}")
