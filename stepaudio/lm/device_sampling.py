"""Drawing the next ids of many rows on the device, without waiting for it: what `Sampler` draws, row by row.

Every request's state lies in tensors with one place per row, so the same captured graph serves any requests. The
random numbers of all its steps are drawn in advance from the generator `Sampler` would draw them from. Stop ids and
the length are watched here; the loop guard needs the ids and stays with the host.

Equal to `Sampler` but for this: probabilities are summed in blocks, in float64, which moves the border between two
ids by some 1e-16 of the whole.
Legend: B places, b rows of one call, V vocabulary, P positions of a cycle, M sets of ids.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.lm.base import IdRange, SamplingParams
from stepaudio.lm.sampling import allowed_at, may_stop_at

DEAD = -1  # what a place without a running row draws
_BLOCK = 256  # probabilities summed at once
_SETS = 16
_LEAST_WIDTH = 64  # sorted values, at least

Rows = slice | Tensor  # which places: the first few, or int64 [b]
State = dict[str, Tensor]  # by the names of `_FIELDS`
_Sizes = dict[str, int]

# name -> (the sizes of its dimensions after B, dtype, value of an empty place)
_FIELDS: dict[str, tuple[tuple[str, ...], torch.dtype, float]] = {
    "temperature": ((), torch.float32, 0.0),
    "top_k": ((), torch.int64, 0),  # 0 keeps all
    "top_p": ((), torch.float32, 1.0),
    "window": ((), torch.int64, 0),
    "share": ((), torch.float64, 0.0),
    "limit": ((), torch.int64, 0),  # max_new_tokens
    "period": ((), torch.int64, 1),  # length of the cycle
    "cycle": (("cycle",), torch.int64, 0),  # which set is forbidden at each position
    "stops": (("stops",), torch.int64, DEAD),
    "uniforms": (("steps",), torch.float32, 0.0),
    "recent": (("window",), torch.int64, DEAD),  # newest first
    "total": ((), torch.int64, 0),  # ids so far, prompt included
    "new": ((), torch.int64, 0),
    "ids": ((), torch.int64, 0),  # drawn last: what the model is fed next
    "active": ((), torch.bool, False),
}
_CHANGING = ("recent", "total", "new", "ids", "active")


class Mode(NamedTuple):
    """What the rules of a batch need; a graph is captured for one mode."""

    draws: bool = False  # a row has a temperature
    width: int = 0  # values to sort for top-k and top-p, 0: none
    nucleus: bool = False  # a row has a top_p below 1
    masks: bool = False  # a row may not draw every id
    repeats: bool = False  # a row has the repetition rule


def mode_of(params: Sequence[SamplingParams], vocab_size: int) -> Mode:
    """The mode that serves all of these requests."""
    drawn = [one for one in params if one.temperature]
    widths = [_width(one, vocab_size) for one in drawn]
    return Mode(
        draws=bool(drawn),
        width=max(widths, default=0),
        nucleus=any(one.top_p < 1 for one in drawn),
        masks=any(one.allowed or one.cycle for one in params),
        repeats=any(one.repetition_window for one in params),
    )


def _width(params: SamplingParams, vocab_size: int) -> int:
    if 0 < params.top_k < vocab_size:
        return min(max(_LEAST_WIDTH, _power(params.top_k)), vocab_size)
    return vocab_size if params.top_p < 1 else 0


class DeviceSampler:
    """State and draw for up to `rows` requests at a time."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.rows, self.vocab_size, self.device = rows, vocab_size, torch.device(device)
        self._sizes: _Sizes = {"cycle": 8, "stops": 8, "steps": 1024, "window": 16}
        self.state = {name: self._empty(name) for name in _FIELDS}  # [B, ...] each
        self._forbidden = torch.zeros(_SETS, vocab_size, dtype=torch.bool, device=self.device)
        self._sets: dict[tuple[IdRange, ...], int] = {}  # ids that may be drawn -> its row of `_forbidden`
        self._used: dict[int, set[int]] = {}  # place -> the sets it uses
        self.out = torch.full((rows,), DEAD, dtype=torch.int64, device=self.device)  # of the last draw, place by place
        self._ages: Tensor = torch.arange(self._sizes["window"], device=self.device)

    @property
    def changing(self) -> list[Tensor]:
        """The tensors that a draw changes."""
        return [*(self.state[name] for name in _CHANGING), self.out]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values()) + self._forbidden.nbytes

    def join(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> bool:
        """Puts requests in places; True if the state moved to larger tensors, which makes captured graphs void."""
        sets = [_sets_of(one) for one in params]
        needed = {
            "cycle": max(map(len, sets)),
            "stops": max(len(one.stop_ids) for one in params),
            "steps": max(one.max_new_tokens for one in params),
            "window": max(one.repetition_window for one in params),
        }
        before = self._forbidden
        indices = [self._place_sets(slot, wanted) for slot, wanted in zip(slots, sets)]
        grown = self._grow(needed) or before is not self._forbidden
        last = [_filled(list(prompt)[: -1 - self._sizes["window"] : -1], self._sizes["window"]) for prompt in prompts]
        values: dict[str, list] = {
            "temperature": [one.temperature for one in params],
            "top_k": [one.top_k if one.top_k < self.vocab_size else 0 for one in params],
            "top_p": [one.top_p for one in params],
            "window": [one.repetition_window for one in params],
            "share": [one.repetition_share for one in params],
            "limit": [one.max_new_tokens for one in params],
            "period": [len(wanted) for wanted in sets],
            "cycle": [_filled(row, self._sizes["cycle"], 0) for row in indices],
            "stops": [_filled(one.stop_ids, self._sizes["stops"]) for one in params],
            "recent": last,
            "total": [len(prompt) for prompt in prompts],
            "new": [0] * len(params),
            "ids": [0] * len(params),
            "active": [True] * len(params),
        }
        where = upload(list(slots), self.device)
        for name, value in values.items():
            self.state[name][where] = upload(value, self.device, _FIELDS[name][1])
        uniforms = uniforms_of(params)
        self.state["uniforms"][where, : uniforms.shape[1]] = upload(uniforms, self.device)
        return grown

    def leave(self, slot: int) -> None:
        """Frees a place; what runs already draws `DEAD` for it from the next step on."""
        self.state["active"][slot] = False
        self._used.pop(slot, None)

    def move(self, source: int, target: int) -> None:
        """Takes a request to another place."""
        for tensor in self.state.values():
            tensor[target] = tensor[source]
        self.state["active"][source] = False
        self._used[target] = self._used.pop(source)

    def draw(self, logits: Tensor, rows: Rows, mode: Mode) -> None:
        """Logits [b, V] of any float type -> one id each in `ids` and `out`, and everything ready for the next.

        `out` is `DEAD` where the place has no running row, and V where its logits are not finite.
        """
        now = {name: tensor[rows] for name, tensor in self.state.items()}
        ids = self._drawn(logits.float(), now, mode)
        new = now["new"] + 1
        self.out[rows] = torch.where(now["active"], ids, DEAD)
        ended = (now["stops"] == ids[:, None]).any(1) | (new >= now["limit"]) | (ids >= self.vocab_size)
        changed = {
            "active": now["active"] & ~ended,
            "total": now["total"] + 1,
            "new": new,
            "ids": ids.clamp(max=self.vocab_size - 1),
        }
        if mode.repeats:
            changed["recent"] = torch.cat([ids[:, None], now["recent"][:, :-1]], dim=1)
        for name, tensor in changed.items():
            self.state[name][rows] = tensor

    def _drawn(self, logits: Tensor, now: State, mode: Mode) -> Tensor:
        if mode.repeats:
            logits = self._without_repetition(logits, now)
        if mode.masks:
            position = now["cycle"].gather(1, (now["new"] % now["period"])[:, None])[:, 0]
            logits = logits.masked_fill(self._forbidden[position], -math.inf)
        best, likeliest = logits.max(1)  # the first of equals
        likeliest = torch.where(best.isfinite(), likeliest, self.vocab_size)
        if not mode.draws:
            return likeliest
        warm = now["temperature"] > 0
        logits = _divided(logits, torch.where(warm, now["temperature"], 1.0)[:, None])
        if mode.width:
            logits = self._top(logits, now, mode)
        step = now["new"].clamp(max=self._sizes["steps"] - 1)
        uniform = now["uniforms"].gather(1, step[:, None])[:, 0]
        return torch.where(warm, draw_rows(logits, uniform), likeliest)

    def _without_repetition(self, logits: Tensor, now: State) -> Tensor:
        """`forbidden_by_repetition`, with its division in float64."""
        recent, window = now["recent"], now["window"]
        last = recent[:, :1]
        count = ((recent == last) & (self._ages < window[:, None])).sum(1)
        often = count.double() / window.double() > now["share"]
        forbidden = (often & (window > 0) & (now["total"] >= window))[:, None]
        last = last.clamp(min=0)
        return logits.scatter(1, last, logits.gather(1, last).masked_fill(forbidden, -math.inf))

    def _top(self, logits: Tensor, now: State, mode: Mode) -> Tensor:
        """`Top`: the k likeliest ids, of those the smallest set with a mass of p; equals stay together."""
        values = logits.topk(mode.width).values
        kept, p = now["top_k"][:, None], now["top_p"][:, None]
        limit = values.gather(1, (kept - 1).clamp(0, mode.width - 1)).masked_fill(kept == 0, -math.inf)
        if mode.nucleus:
            peak = logits.masked_fill(logits < limit, -math.inf).softmax(1).amax(1, keepdim=True)
            mass = (values - values[:, :1]).exp() * peak
            outside = mass.cumsum(1) - mass >= p
            outside |= (torch.arange(mode.width, device=self.device) >= kept) & (kept > 0)
            limit = torch.where(p < 1, values.masked_fill(outside, math.inf).amin(1, keepdim=True), limit)
        return logits.masked_fill(logits < limit, -math.inf)

    def _place_sets(self, slot: int, wanted: Sequence[tuple[IdRange, ...]]) -> list[int]:
        """Rows of `_forbidden` for the sets, made where they are not there yet; row 0 forbids nothing."""
        used = self._used[slot] = {self._sets[ranges] for ranges in wanted if ranges in self._sets}
        for ranges in wanted:
            if ranges and ranges not in self._sets:
                taken = {0}.union(*self._used.values())
                index = next((one for one in range(len(self._forbidden)) if one not in taken), None)
                if index is None:
                    index = len(self._forbidden)
                    self._forbidden = torch.cat([self._forbidden, torch.zeros_like(self._forbidden)])
                self._sets = {key: one for key, one in self._sets.items() if one != index}
                self._sets[ranges] = index
                used.add(index)
                self._forbidden[index] = True
                for start, end in ranges:
                    self._forbidden[index, start:end] = False
        return [self._sets[ranges] if ranges else 0 for ranges in wanted]

    def _grow(self, needed: _Sizes) -> bool:
        larger = {name: _power(size) for name, size in needed.items() if size > self._sizes[name]}
        self._sizes |= larger
        for name, (dimensions, _, _) in _FIELDS.items():
            if larger.keys() & set(dimensions):
                old, self.state[name] = self.state[name], self._empty(name)
                self.state[name][:, : old.shape[1]] = old
        self._ages = torch.arange(self._sizes["window"], device=self.device)
        return bool(larger)

    def _empty(self, name: str) -> Tensor:
        dimensions, dtype, value = _FIELDS[name]
        shape = (self.rows, *(self._sizes[size] for size in dimensions))
        return torch.full(shape, value, dtype=dtype, device=self.device)


def _sets_of(params: SamplingParams) -> list[tuple[IdRange, ...]]:
    """What may be drawn at each position of the cycle, stop ids included; () for anything."""
    if not (params.allowed or params.cycle):
        return [()]
    stops = tuple((index, index + 1) for index in params.stop_ids)
    return [
        (*allowed_at(params, position), *(stops if may_stop_at(params, position) else ()))
        for position in range(len(params.cycle) or 1)
    ]


def uniforms_of(params: Sequence[SamplingParams]) -> Tensor:
    """The numbers `Sampler` would draw, float32 [b, longest max_new_tokens]; zeros where it draws none."""
    uniforms = torch.zeros(len(params), max(one.max_new_tokens for one in params))
    for row, one in zip(uniforms, params):
        if one.temperature:
            generator = torch.Generator().manual_seed(secrets.randbits(63) if one.seed is None else one.seed)
            row[: one.max_new_tokens] = torch.rand(one.max_new_tokens, generator=generator)
    return uniforms


def draw_rows(logits: Tensor, uniform: Tensor) -> Tensor:
    """`draw_at` for rows: [b, V] and [b] -> int64 [b]; V where the logits are not finite."""
    rows, vocab_size = logits.shape
    parts = F.pad(logits.softmax(1), (0, -vocab_size % _BLOCK)).view(rows, -1, _BLOCK)
    mass = parts.sum(2, dtype=torch.float64).cumsum(1)
    whole = mass[:, -1:]
    target = whole * uniform[:, None]
    block = (mass <= target).sum(1, keepdim=True).clamp(max=mass.shape[1] - 1)
    before = mass.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = parts.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(1, dtype=torch.float64)
    place = (inside + before <= target).sum(1).clamp(max=_BLOCK - 1)
    return torch.where(whole[:, 0] > 0, block[:, 0] * _BLOCK + place, vocab_size)


def upload(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on the device, without waiting for what the device still does."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _divided(logits: Tensor, temperature: Tensor) -> Tensor:
    """As dividing by a Python number, which on CUDA is a product with its float32 reciprocal."""
    return logits * temperature.reciprocal() if logits.device.type == "cuda" else logits / temperature


def _filled(ids: Sequence[int], size: int, value: int = DEAD) -> list[int]:
    return [*ids, *[value] * (size - len(ids))]


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()
