"""Attention of all layers of one step over a static cache: kernels where they can run, else the plain form below.

What the layers have in common, the position bias above all, is made once per step: both functions return the
attention of a layer as a function of its number, its queries and its new keys and values, which it also stores.
The kernels' plain forms (`kernels/attention.py`) are the oracle. Legend as in `fused.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.lm.cache import StaticCache
from stepaudio.lm.kernels import attention as kernels
from stepaudio.lm.kernels.available import available, takes
from stepaudio.lm.kernels.workspace import Workspace

Attend = Callable[[int, Tensor, Tensor], Tensor]


def decode_attention(
    like: Tensor,
    cache: StaticCache,
    lengths: Tensor,
    slopes: Tensor,
    scaling: float,
    max_length: int,
    workspace: Workspace | None = None,
) -> Attend:
    """For one new token of each of the first B rows: (layer, q [B, H, D], k and v [B, 2 G D]) -> [B, H, D].

    `lengths` int32 [B] keys count, the new one included, at most `max_length` of any row. `like` has the dtype and
    the device of the queries.
    """
    rows = lengths.shape[0]
    if _has_kernels(like):

        def by_kernel(layer: int, query: Tensor, shared: Tensor) -> Tensor:
            keys, values = cache.keys(layer, rows), cache.values(layer, rows)
            new = shared.view(rows, 2, *keys.shape[1:4:2])
            return kernels.decode_attention(
                query, keys, values, lengths, slopes, scaling, max_length, (new[:, 0], new[:, 1]), workspace
            )

        return by_kernel
    places = (lengths - 1).long()
    bias = _bias(lengths - 1, 1, max_length, slopes)

    def plainly(layer: int, query: Tensor, shared: Tensor) -> Tensor:
        cache.write_token(layer, places, shared)
        keys, values = cache.keys(layer, rows)[:, :, :max_length], cache.values(layer, rows)[:, :, :max_length]
        return _attend(query[:, None], keys, values, bias, scaling)[:, 0]

    return plainly


def prefill_attention(
    like: Tensor,
    cache: StaticCache,
    slots: Tensor,
    lengths: Tensor,
    slopes: Tensor,
    scaling: float,
    rows: int,
    start: int = 0,
    slot: int = 0,
) -> Attend:
    """For R = `rows` new tokens of n prompts: (layer, q [n R, H, D], k and v [n R, 2 G D]) -> [n R, H, D].

    They go to the places `slots` int64 [n] from index `start` on; with `start` > 0 there is one prompt, in place
    `slot`, whose earlier keys are read from there. `lengths` int32 [n] of the tokens count, what comes out for the
    others is finite and means nothing.
    """
    count, starts = lengths.shape[0], torch.full_like(lengths, start)
    by_kernel = _has_kernels(like)
    bias = None if by_kernel else _bias(starts, rows, start + rows, slopes)

    def attend(layer: int, query: Tensor, shared: Tensor) -> Tensor:
        shared = shared.view(count, rows, -1)
        cache.write_tokens(layer, slots, start, shared)
        if start:
            keys, values = cache.storage[layer][:, slot : slot + 1, :, : start + rows]
        else:
            keys, values = shared.unflatten(2, (2, -1, query.shape[2])).permute(2, 0, 3, 1, 4)
        query = query.view(count, rows, *query.shape[1:])
        if bias is None:
            mixed = kernels.prefill_attention(query, keys, values, starts, lengths, slopes, scaling)
        else:
            mixed = _attend(query, keys, values, bias, scaling)
        return mixed.flatten(0, 1)

    return attend


def _has_kernels(like: Tensor) -> bool:
    return takes(like) or (like.is_cuda and available(like.device))


def _bias(starts: Tensor, rows: int, seen: int, slopes: Tensor) -> Tensor:
    """Of `rows` queries after `starts` [n] keys towards `seen` keys, float32 [n, H, R, S]."""
    queries = starts[:, None, None] + torch.arange(rows, device=starts.device)[:, None]
    distance = (queries - torch.arange(seen, device=starts.device))[:, None]
    bias = -slopes[:, None, None] * distance.clamp(min=0).float().sqrt()
    return bias.masked_fill_(distance < 0, torch.finfo(torch.float32).min / 2)  # finite: a row may see no key


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[n, R, H, D] in float32; the heads of a group stand as extra rows beside their shared keys."""
    (count, rows, heads, width), groups = query.shape, keys.shape[1]
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2).reshape(count, groups, -1, width).float(),
        keys.float(),
        values.float(),
        attn_mask=bias.view(count, groups, -1, bias.shape[-1]),
        scale=scaling,
    )
    return output.reshape(count, heads, rows, width).transpose(1, 2).to(query.dtype)
