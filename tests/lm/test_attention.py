"""The sqrt-ALiBi oracle against the formula written out, and its chunks, masks and precisions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepaudio.lm import attention
from stepaudio.lm.attention import (
    alibi_slopes,
    local_slopes,
    sqrt_alibi_attention,
    sqrt_alibi_bias,
)

MODULE = nn.Identity()


def by_hand(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, slopes: Tensor, start: int) -> Tensor:
    """Attention as formats.md 3.3 writes it, one score at a time over float64; seen [B, S] -> [B, R, H, D]."""
    batch, heads, rows, width = query.shape
    share = heads // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros(batch, rows, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                keys = [j for j in range(start + r + 1) if seen[b, j]]
                scores = [
                    query[b, h, r] @ key[b, h // share, j] / width**0.5 - slopes[h].double() * (start + r - j) ** 0.5
                    for j in keys
                ]
                weights = torch.stack(scores).softmax(0)
                output[b, r, h] = sum(w * value[b, h // share, j] for w, j in zip(weights, keys))
    return output


def tensors(batch: int, heads: int, groups: int, rows: int, keys: int, width: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    shapes = ((batch, heads, rows, width), (batch, groups, keys, width), (batch, groups, keys, width))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize(
    "heads, index, exponent",
    [
        *((48, 0, -0.25), (48, 31, -8), (48, 32, -0.125), (48, 47, -3.875)),
        *((96, 0, -0.125), (96, 63, -8), (96, 64, -0.0625), (96, 95, -3.9375)),
        *((1, 0, -8), (6, 3, -8), (6, 4, -1), (6, 5, -3)),
    ],
)
def test_slopes_of_the_release(heads: int, index: int, exponent: float) -> None:
    slopes = alibi_slopes(heads)
    assert len(slopes) == heads and slopes.dtype == torch.float32
    assert slopes[index].item() == pytest.approx(2**exponent, rel=1e-7)


def test_slopes_keep_their_precision_when_a_model_changes_its_own() -> None:
    with torch.inference_mode():
        slopes = alibi_slopes(13)
    assert not slopes.is_inference() and not any(True for _ in MODULE.to(torch.bfloat16).buffers())


def test_each_rank_takes_its_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = alibi_slopes(12)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(local_slopes(12, 6, whole.device))
    assert torch.equal(torch.cat(parts[:2]), whole) and torch.equal(torch.cat(parts[2:]), whole)
    assert torch.equal(local_slopes(12, 12, whole.device), whole)


def test_bias_rows_are_the_rows_of_the_whole() -> None:
    slopes, keys = alibi_slopes(5), torch.arange(40)
    whole = sqrt_alibi_bias(slopes, keys, keys)
    assert torch.equal(sqrt_alibi_bias(slopes, keys[-3:], keys), whole[:, -3:])
    assert whole[2, 30, 5].item() == pytest.approx(-slopes[2].item() * 5, rel=1e-6)
    assert whole[:, 3, 4].eq(-math.inf).all() and whole[:, 7, 7].eq(0).all()


@pytest.mark.parametrize(
    "batch, heads, groups, rows, keys, width",
    [(1, 4, 2, 9, 9, 8), (2, 6, 2, 3, 11, 16), (1, 12, 1, 1, 7, 4), (3, 5, 5, 4, 4, 6), (1, 1, 1, 1, 1, 64)],
)
def test_equals_the_formula(batch: int, heads: int, groups: int, rows: int, keys: int, width: int) -> None:
    query, key, value = tensors(batch, heads, groups, rows, keys, width)
    slopes, start = alibi_slopes(heads), keys - rows
    seen = torch.ones(batch, keys, dtype=torch.bool)
    expected = by_hand(query, key, value, seen, slopes, start)
    options = {"scaling": width**-0.5, "slopes": slopes, "query_start": start}
    output, weights = sqrt_alibi_attention(MODULE, query, key, value, None, **options)
    assert weights is None and output.shape == (batch, rows, heads, width)
    assert (output - expected).abs().max() < 2e-6
    for row in range(batch - 1):
        seen[row, : row + 1] = start < row + 1  # hides real keys only where every row still sees one
    if start >= batch:
        expected = by_hand(query, key, value, seen, slopes, start)
        output, _ = sqrt_alibi_attention(MODULE, query, key, value, seen, **options)
        assert (output - expected).abs().max() < 2e-6


def test_static_cache_places_beyond_the_filled_part_are_not_seen() -> None:
    query, key, value = tensors(1, 4, 2, 2, 10, 8)
    options = {"scaling": 0.3, "slopes": alibi_slopes(4)}
    expected, _ = sqrt_alibi_attention(MODULE, query, key[:, :, :6], value[:, :, :6], None, query_start=4, **options)
    key[:, :, 6:] = 1e4
    found, _ = sqrt_alibi_attention(MODULE, query, key, value, None, query_start=torch.tensor(4), **options)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 200, 1000])
@pytest.mark.parametrize("start", [0, 5])
def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int, start: int) -> None:
    query, key, value = tensors(2, 6, 3, 23, 23 + start, 8)
    seen = torch.ones(2, 23 + start, dtype=torch.bool)
    seen[1, :4] = False
    square = seen[:, None, None] & torch.ones(23, 23 + start, dtype=torch.bool).tril(start)
    options = {"scaling": 0.35, "slopes": alibi_slopes(6), "query_start": start}
    for mask in (None, seen, square):
        query.requires_grad_(True)
        whole, _ = sqrt_alibi_attention(MODULE, query, key, value, mask, **options)
        gradient = torch.autograd.grad(whole[0].square().sum(), query)[0]
        with monkeypatch.context() as patch:
            patch.setattr(attention, "BIAS_ELEMENTS", limit)
            chunked, _ = sqrt_alibi_attention(MODULE, query, key, value, mask, **options)
            found = torch.autograd.grad(chunked[0].square().sum(), query)[0]
        real = slice(None) if mask is None or start >= 4 else slice(4, None)
        assert torch.allclose(chunked[:, real], whole[:, real], atol=2e-6)
        assert torch.allclose(found, gradient, atol=2e-5)


def test_the_bias_alive_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = attention.sqrt_alibi_bias

    def watched(*args: Tensor) -> Tensor:
        sizes.append(plain(*args).numel())
        return plain(*args)

    monkeypatch.setattr(attention, "sqrt_alibi_bias", watched)
    monkeypatch.setattr(attention, "BIAS_ELEMENTS", 10_000)
    query, key, value = tensors(1, 4, 2, 300, 300, 8)
    with torch.no_grad():
        sqrt_alibi_attention(MODULE, query, key, value, None, scaling=1.0, slopes=alibi_slopes(4))
    assert len(sizes) > 10 and max(sizes) <= 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alibi_dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_stay_finite(dtype: torch.dtype, alibi_dtype: torch.dtype) -> None:
    query, key, value = (part.to(dtype).requires_grad_(True) for part in tensors(2, 4, 2, 6, 6, 8))
    seen = torch.ones(2, 6, dtype=torch.bool)
    seen[0, :3] = False
    output, _ = sqrt_alibi_attention(
        MODULE, query, key, value, seen, scaling=0.35, slopes=alibi_slopes(4), alibi_dtype=alibi_dtype
    )
    assert output.dtype == dtype and output.isfinite().all()
    output[0, 3:].float().sum().backward()
    assert all(part.grad.isfinite().all() for part in (query, key, value))
    assert key.grad[0, :, :3].eq(0).all() and value.grad[0, :, :3].eq(0).all()  # nothing leaks out of the padding


def test_the_rounded_bias_differs_and_the_full_one_does_not_follow_autocast() -> None:
    query, key, value = tensors(1, 4, 2, 64, 64, 16)
    options = {"scaling": 0.25, "slopes": alibi_slopes(4)}
    full, _ = sqrt_alibi_attention(MODULE, query, key, value, None, **options)
    rounded, _ = sqrt_alibi_attention(MODULE, query, key, value, None, alibi_dtype=torch.bfloat16, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = sqrt_alibi_attention(MODULE, query, key, value, None, **options)
    assert 1e-4 < (full - rounded).abs().max() < 0.1
    assert torch.equal(full, cast)


def test_an_additive_mask_is_added() -> None:
    query, key, value = tensors(1, 4, 2, 5, 5, 8)
    options = {"scaling": 0.35, "slopes": alibi_slopes(4)}
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    allowed[..., 3:, 1] = False
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, -math.inf)
    boolean, _ = sqrt_alibi_attention(MODULE, query, key, value, allowed, **options)
    added, _ = sqrt_alibi_attention(MODULE, query, key, value, additive, **options)
    assert torch.allclose(boolean, added, atol=1e-6)
