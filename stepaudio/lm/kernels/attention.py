"""Attention with the square-root ALiBi bias over a static cache: one query per row (decode) and many (prefill).

    score(i, j) = q_i . k_j * scaling - slope_h * sqrt(i - j)   for j <= i, all of it in float32

On a GPU that can run them, Triton kernels; elsewhere `decode_plain` and `prefill_plain`, their oracles. The release's
rounding of the bias to bfloat16 is not offered here (`stepaudio/lm/attention.py` has it).

Legend: B rows, H query heads, G key/value groups (G divides H), D head width, C cache capacity, R new rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepaudio.lm.kernels.available import available, launch, takes
from stepaudio.lm.kernels.workspace import Workspace, shared_workspace

WIDTHS = (16, 32, 64, 128)  # head widths the kernels take
_MAX_SPLITS = 32
_BLOCKS_WANTED = 4 * 132
_PLAIN_ELEMENTS = 2**26  # scores alive at once in the plain form


def decode_plain(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slopes: Tensor, scaling: float
) -> Tensor:
    """The oracle of `decode_attention`, in float32 (float64 for float64 input)."""
    starts = (lengths - 1).clamp(min=0)
    return prefill_plain(query[:, None], keys, values, starts, lengths.clamp(max=1), slopes, scaling)[:, 0]


def prefill_plain(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor, slopes: Tensor, scaling: float
) -> Tensor:
    """The oracle of `prefill_attention`, in float32 (float64 for float64 input), a few rows at a time."""
    rows, (_, groups, capacity, _) = query.shape[1], keys.shape
    step = max(1, _PLAIN_ELEMENTS // max(1, query.shape[0] * query.shape[2] * capacity))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values, slopes = keys.to(wide), values.to(wide), slopes.to(wide)
    seen = torch.arange(capacity, device=query.device) < (starts + lengths)[:, None]  # beyond may lie anything
    values = values.masked_fill(~seen[:, None, :, None], 0)
    parts = []
    for first in range(0, rows, step):
        part = query[:, first : first + step].to(wide).unflatten(2, (groups, -1))  # [B, R, G, P, D]
        row = torch.arange(first, first + part.shape[1], device=query.device)
        distance = (row + starts[:, None])[:, :, None] - torch.arange(capacity, device=query.device)
        scores = torch.einsum("brgpd,bgcd->bgprc", part, keys).flatten(1, 2) * scaling
        scores -= slopes[:, None, None] * distance.clamp(min=0).to(wide).sqrt()[:, None]
        weights = scores.masked_fill(distance[:, None] < 0, -math.inf).softmax(-1)
        output = torch.einsum("bgprc,bgcd->brgpd", weights.unflatten(1, (groups, -1)), values).flatten(2, 3)
        parts.append(output.masked_fill((row >= lengths[:, None])[:, :, None, None], 0))
    return torch.cat(parts, 1).to(query.dtype)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slopes: Tensor,
    scaling: float,
    max_length: int | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """One query per row: [B, H, D] over keys and values [B, G, C, D] -> [B, H, D].

    lengths int32 [B]: keys of each row, the new one included; 0 gives zeros. slopes float32 [H].
    max_length: no row is longer (default C); it only chooses how finely keys are split, so a graph may be captured
    with a bucket's bound. new: key and value [B, G, D] of the newest token; they are written to index lengths - 1
    of the cache here. workspace: needed by callers that launch on several streams.
    """
    if not _kernel_takes(query, keys, values, slopes):
        if new is not None:
            _write_newest(keys, values, lengths, new)
        bound = keys.shape[2] if max_length is None else max_length
        return decode_plain(query, keys[:, :, :bound], values[:, :, :bound], lengths, slopes, scaling)
    from stepaudio.lm.kernels import attention_triton

    batch, heads, width = query.shape
    groups, capacity = keys.shape[1:3]
    step = 32 if query.dtype == torch.float32 else 128 if width <= 64 else 64
    splits = _splits(batch * groups, -(-(max_length or capacity) // step))
    filled = max(16, 1 << (heads // groups - 1).bit_length())
    query = query if query.stride(2) == 1 and query.stride(1) == width else query.contiguous()
    new_keys, new_values = (query, query) if new is None else _aligned(*new)
    out = query.new_empty(batch, heads, width)
    workspace = workspace or shared_workspace(query.device)
    pairs = batch * groups
    floats, counters = workspace.take(pairs * splits * filled * (width + 2), pairs if splits > 1 else 0)
    launch(
        attention_triton.decode,
        (pairs, splits),
        query.device,
        query,
        keys,
        values,
        new_keys,
        new_values,
        lengths,
        slopes,
        out,
        floats,
        counters,
        scaling,
        query.stride(0),
        new_keys.stride(0),
        *keys.stride()[:3],
        GROUPS=groups,
        P=heads // groups,
        PP=filled,
        D=width,
        BN=step,
        SPLITS=splits,
        NEW=new is not None,
        num_warps=4,
        num_stages=2,
    )
    return out


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor, slopes: Tensor, scaling: float
) -> Tensor:
    """Causal attention of new rows: [B, R, H, D] over keys and values [B, G, C, D] -> [B, R, H, D].

    starts int32 [B]: keys before a row's first new one; its new keys follow in the cache. lengths int32 [B]: new rows
    that count; the others give zeros. slopes float32 [H].
    """
    if not _kernel_takes(query, keys, values, slopes):
        return prefill_plain(query, keys, values, starts, lengths, slopes, scaling)
    from stepaudio.lm.kernels import attention_triton

    batch, rows, heads, width = query.shape
    if query.stride(3) != 1 or query.stride(2) != width:
        query = query.contiguous()
    out = query.new_empty(batch, rows, heads, width)
    single = query.dtype == torch.float32  # no tensor cores: smaller tiles
    tile_rows = 16 if rows <= 16 else 32 if single else 64 if rows <= 64 else 128
    launch(
        attention_triton.prefill,
        (-(-rows // tile_rows), heads, batch),
        query.device,
        query,
        keys,
        values,
        starts,
        lengths,
        slopes,
        out,
        scaling,
        rows,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        H=heads,
        P=heads // keys.shape[1],
        D=width,
        BM=tile_rows,
        BN=32 if single else 64,
        num_warps=8 if tile_rows == 128 and width == 128 else 4,
        num_stages=3 if width <= 64 and not single else 2,
    )
    return out


def _kernel_takes(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor) -> bool:
    """Whether the kernels can run this, float32 included; they read values with the strides of keys."""
    heads, width = query.shape[-2:]
    assert heads % keys.shape[1] == 0 and slopes.shape == (heads,), f"{heads} heads, {tuple(slopes.shape)} slopes"
    return (
        (takes(query) or (query.dtype == torch.float32 and query.is_cuda and available(query.device)))
        and query.dtype == keys.dtype == values.dtype
        and width in WIDTHS
        and query.numel() > 0
        and keys.stride() == values.stride()
        and keys.stride(3) == 1
    )


def _splits(pairs: int, steps: int) -> int:
    """Parts of the keys, a power of two: enough blocks for the device, none shorter than one step."""
    splits = 1
    while splits < min(_MAX_SPLITS, steps) and pairs * splits < _BLOCKS_WANTED:
        splits *= 2
    return splits


def _aligned(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and values [B, G, D] whose rows are dense and equally far apart."""
    if keys.stride() == values.stride() and keys.stride(2) == 1 and keys.stride(1) == keys.shape[2]:
        return keys, values
    return keys.contiguous(), values.contiguous()


def _write_newest(keys: Tensor, values: Tensor, lengths: Tensor, new: tuple[Tensor, Tensor]) -> None:
    """Key and value [B, G, D] to index lengths - 1 of each row; a row of length 0 keeps what it has."""
    rows = torch.arange(keys.shape[0], device=keys.device)
    places = (lengths.long() - 1).clamp(min=0)
    there = (lengths > 0)[:, None, None]
    for cache, newest in zip((keys, values), new):
        cache[rows, :, places] = torch.where(there, newest, cache[rows, :, places])
