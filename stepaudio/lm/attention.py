"""Square-root ALiBi attention: slopes, bias, and the plain implementation that faster ones are measured against.

    score(i, j) = q_i . k_j / sqrt(D) - slope_h * sqrt(i - j)   for j <= i, nothing else tells positions apart.

Knows nothing about layers, caches or weights, and needs torch alone. An implementation is a function with the
signature of `sqrt_alibi_attention`; `modeling.register_attention` makes it known to the model.
The bias depends on i - j alone, so left padding needs no shifted positions, only hidden keys.

Legend: B batch, H query heads of this rank, G key/value groups, R query rows, S keys, D head width.
Source: formats.md 3.3.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BIAS_ELEMENTS = 2**26  # bias numbers alive at once: query rows are taken in chunks (256 MiB in float32)

Position = int | Tensor  # place of the first query row in the cached sequence; a 0-d tensor for static caches


@lru_cache(maxsize=64)
def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Slopes of all heads of the model, float32 [num_heads]; the rule for non-powers of two is ALiBi's own.

    One tensor per device, not a buffer: a buffer would follow `model.to(bfloat16)` and lose its digits.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    slopes += [2 ** (-4 * k / power) for k in range(1, 2 * (num_heads - power), 2)]
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)


def local_slopes(num_heads: int, local_heads: int, device: torch.device) -> Tensor:
    """Slopes of this rank's heads, float32 [local_heads].

    Under tensor parallelism the projections hand out a contiguous block of heads; which one follows from the
    rank, tensor parallelism being the innermost dimension of a device mesh.
    """
    slopes = alibi_slopes(num_heads, device)
    if local_heads == num_heads:
        return slopes
    assert num_heads % local_heads == 0, f"{num_heads} heads do not split into blocks of {local_heads}"
    first = torch.distributed.get_rank() % (num_heads // local_heads) * local_heads
    return slopes[first : first + local_heads]


def sqrt_alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """-slope * sqrt(i - j), float32 [H, R, S] for positions [R] and [S]; -inf where the key lies ahead."""
    distance = query_positions[:, None] - key_positions
    bias = -slopes[:, None, None] * distance.clamp(min=0).float().sqrt()
    return bias.masked_fill(distance < 0, -math.inf)


def sqrt_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slopes: Tensor,
    query_start: Position = 0,
    alibi_dtype: torch.dtype = torch.float32,
    **_: object,
) -> tuple[Tensor, None]:
    """The plain implementation, on any device; every faster one is measured against it.

    query [B, H, R, D], key and value [B, G, S, D], slopes float32 [H] -> [B, R, H, D] in the dtype of query.
    attention_mask: None, bool [B, S] (True: the key is real), or bool / additive [B, 1, R, S].
    alibi_dtype float32 computes bias and attention in float32; bfloat16 rounds the bias to it and computes in
    the dtype of query, which is the release's own fallback. A row that may see no key gives finite numbers.
    """
    dtype, rows, keys = query.dtype, query.shape[2], key.shape[2]
    if alibi_dtype == torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    width = slopes.shape[0] * keys * (1 if attention_mask is None else query.shape[0])
    step = max(1, BIAS_ELEMENTS // width)
    attend = _recomputed if rows > step and torch.is_grad_enabled() else _attend_rows
    outputs = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        seen = query_start + last if isinstance(query_start, int) else keys
        mask = _rows_of_mask(attention_mask, first, last, seen)
        chunk = query[:, :, first:last]
        start = query_start + first
        outputs.append(attend(chunk, key[:, :, :seen], value[:, :, :seen], mask, slopes, start, alibi_dtype, scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


def _rows_of_mask(mask: Tensor | None, first: int, last: int, seen: int) -> Tensor | None:
    """The part of a mask for query rows first..last and the first `seen` keys, as [B, 1, 1 or R, S]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None, :seen].bool()
    return mask[:, :, first:last, :seen]


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor,
    start: Position,
    alibi_dtype: torch.dtype,
    scaling: float,
) -> Tensor:
    """Attention of one chunk of rows: query [B, H, R, D] -> [B, H, R, D].

    The heads of a group stand as extra rows beside their shared keys, so keys and values are not repeated.
    """
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1:3]
    positions = torch.arange(rows, device=query.device) + start
    bias = sqrt_alibi_bias(slopes, positions, torch.arange(keys, device=query.device))[None]
    bias = bias.to(alibi_dtype).to(query.dtype)
    if mask is not None:
        bias = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)
    # Finite, with room for a kernel's factor log2(e): a row of nothing but -inf would turn into NaN.
    bias = bias.clamp(min=torch.finfo(bias.dtype).min / 2)
    with torch.autocast(query.device.type, enabled=False):  # it would round the bias again
        output = F.scaled_dot_product_attention(
            query.reshape(batch, groups, -1, width),
            key,
            value,
            attn_mask=bias.view(-1, groups, heads // groups * rows, keys),
            scale=scaling,
        )
    return output.reshape(batch, heads, rows, width)


def _recomputed(*args: object) -> Tensor:
    """`_attend_rows` for training on long rows: the bias is built again in the backward pass, not kept."""
    return checkpoint(_attend_rows, *args, use_reentrant=False)
