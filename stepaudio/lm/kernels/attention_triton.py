"""The Triton side of `attention.py`: one query per row over split keys, and tiles of queries over all keys before them.

Scores are kept in units of log2(e), so that exp2 makes the weights. Bias, maxima and sums are float32; the weights are
rounded to the dtype of the values for the second product. EARLY: launched before the predecessor has ended.

Legend: B rows, H query heads, G key/value groups, P = H / G heads of a group (PP with filling), D head width,
C cache capacity, R query rows, BN keys of a step.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
from __future__ import annotations

from stepaudio.lm.kernels.jit import jit, tl, tl_cuda


@jit
def _combine(
    floats, tops, weights, out, out_place, out_inside, active, SPLITS: tl.constexpr, PP: tl.constexpr, D: tl.constexpr
):
    """out [PP, D] from the partial results [SPLITS, PP, D] of this row and group, of which `active` count."""
    STEP: tl.constexpr = 8 if SPLITS >= 8 else SPLITS
    head, column = tl.arange(0, PP), tl.arange(0, D)
    split = tl.arange(0, SPLITS)
    both = split[:, None] * PP + head[None, :]
    counted = (split < active)[:, None]
    top = tl.load(tops + both, mask=counted, other=-float("inf"), cache_modifier=".cg")
    highest = tl.max(top, 0)
    total = tl.load(weights + both, mask=counted, other=0.0, cache_modifier=".cg")
    total = tl.sum(total * tl.exp2(top - highest[None, :]), 0)
    result = tl.zeros([PP, D], tl.float32)
    for first in tl.range(0, active, STEP):
        part = first + tl.arange(0, STEP)
        factor = tl.load(
            tops + part[:, None] * PP + head[None, :],
            mask=(part < active)[:, None],
            other=-float("inf"),
            cache_modifier=".cg",
        )
        factor = tl.exp2(factor - highest[None, :])
        value = tl.load(
            floats + (part[:, None, None] * PP + head[None, :, None]) * D + column[None, None, :],
            mask=(part < active)[:, None, None],
            other=0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(value * factor[:, :, None], 0)
    tl.store(out + out_place, (result / total[:, None]).to(out.dtype.element_ty), mask=out_inside)


@jit
def decode(
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
    query_stride,
    new_stride,
    batch_stride,
    group_stride,
    key_stride,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    NEW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One split of the keys of one row and group; the last split to finish puts them together.

    The keys of a row are dealt evenly to as many splits as its length needs. With NEW the last key and value come
    from `new_keys` and `new_values` and are written to the cache by the block that reads them.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    pairs = tl.num_programs(0).to(tl.int64)
    batch, group = pair // GROUPS, pair % GROUPS
    length = tl.load(lengths + batch)
    blocks = tl.cdiv(length, BN)
    per = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    active = tl.maximum(tl.cdiv(blocks, per), 1)
    if split < active:
        head, column = tl.arange(0, PP), tl.arange(0, D)
        real = head < P
        place = (group * P + head)[:, None] * D + column[None, :]
        q = tl.load(query + batch.to(tl.int64) * query_stride + place, mask=real[:, None], other=0.0)
        slope = tl.load(slopes + group * P + head, mask=real, other=0.0) * LOG2E
        base = batch.to(tl.int64) * batch_stride + group.to(tl.int64) * group_stride
        last = length - 1
        top = tl.full([PP], -float("inf"), tl.float32)
        total = tl.zeros([PP], tl.float32)
        result = tl.zeros([PP, D], tl.float32)
        for block in tl.range(split * per, tl.minimum(split * per + per, blocks)):
            j = block * BN + tl.arange(0, BN)
            stored = j < (last if NEW else length)
            here = base + j.to(tl.int64)[:, None] * key_stride + column[None, :]
            k = tl.load(keys + here, mask=stored[:, None], other=0.0)
            v = tl.load(values + here, mask=stored[:, None], other=0.0)
            if NEW:
                new = batch.to(tl.int64) * new_stride + group * D + column
                newest = (j == last)[:, None]
                k = tl.where(newest, tl.load(new_keys + new)[None, :], k)
                v = tl.where(newest, tl.load(new_values + new)[None, :], v)
                tl.store(keys + here, k, mask=newest)
                tl.store(values + here, v, mask=newest)
            bias = slope[:, None] * tl.sqrt(tl.maximum(last - j, 0).to(tl.float32))[None, :]
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2E) - bias
            score = tl.where((j < length)[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            kept = tl.exp2(top - higher)
            total = total * kept + tl.sum(weight, 1)
            result = tl.dot(weight.to(v.dtype), v, result * kept[:, None], input_precision="ieee")
            top = higher
        out_place = batch.to(tl.int64) * (GROUPS * P * D) + place
        if active == 1:
            result = result / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + out_place, result.to(out.dtype.element_ty), mask=real[:, None])
        else:
            mine = pair.to(tl.int64) * SPLITS
            tops = floats + pairs * (SPLITS * PP * D)
            weights = tops + pairs * (SPLITS * PP)
            tl.store(floats + ((mine + split) * PP + head)[:, None] * D + column[None, :], result)
            tl.store(tops + (mine + split) * PP + head, top)
            tl.store(weights + (mine + split) * PP + head, total)
            tl.debug_barrier()
            if tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu") == active - 1:
                tl.store(counters + pair, 0)
                _combine(
                    floats + mine * PP * D,
                    tops + mine * PP,
                    weights + mine * PP,
                    out,
                    out_place,
                    real[:, None],
                    active,
                    SPLITS,
                    PP,
                    D,
                )


@jit
def _attend(result, top, total, q, keys, values, j, i, seen, slope, factor, key_stride, column):
    """One step of keys j [BN] for the queries at places i [BM]: the running (result, top, total)."""
    inside = (j < seen)[:, None]
    here = j.to(tl.int64)[:, None] * key_stride + column[None, :]
    k = tl.load(keys + here, mask=inside, other=0.0)
    distance = i[:, None] - j[None, :]
    bias = slope * tl.sqrt(tl.maximum(distance, 0).to(tl.float32))
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor - bias
    score = tl.where((distance >= 0) & (j < seen)[None, :], score, -float("inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    kept = tl.exp2(top - higher)
    total = total * kept + tl.sum(weight, 1)
    v = tl.load(values + here, mask=inside, other=0.0)
    result = tl.dot(weight.to(v.dtype), v, result * kept[:, None], input_precision="ieee")
    return result, higher, total


@jit
def prefill(
    query,
    keys,
    values,
    starts,
    lengths,
    slopes,
    out,
    scaling,
    new_rows,
    query_batch_stride,
    query_row_stride,
    key_batch_stride,
    key_group_stride,
    key_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BM query rows of one head: all keys up to each row's own place; zeros for rows beyond the row count."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, length = tl.load(starts + batch), tl.load(lengths + batch)
    row, column = block * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = row < length
    place = batch * query_batch_stride + row.to(tl.int64)[:, None] * query_row_stride + head * D + column[None, :]
    q = tl.load(query + place, mask=inside[:, None], other=0.0)
    slope = tl.load(slopes + head) * LOG2E
    base = batch * key_batch_stride + (head // P).to(tl.int64) * key_group_stride
    seen = start + tl.minimum(length, (block + 1) * BM)  # keys that any row of this block sees
    seen = tl.where(block * BM < length, seen, 0)
    top = tl.full([BM], -1.0e30, tl.float32)  # finite: rows of filling see no key
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, D], tl.float32)
    for first in tl.range(0, seen, BN):
        result, top, total = _attend(
            result,
            top,
            total,
            q,
            keys + base,
            values + base,
            first + tl.arange(0, BN),
            start + row,
            seen,
            slope,
            scaling * LOG2E,
            key_stride,
            column,
        )
    result = tl.where(inside[:, None], result / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    out_place = (batch * new_rows + row.to(tl.int64))[:, None] * (H * D) + head * D + column[None, :]
    tl.store(out + out_place, result.to(out.dtype.element_ty), mask=(row < new_rows)[:, None])
