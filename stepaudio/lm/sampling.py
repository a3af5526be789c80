"""Drawing the next token id: rules on logits in a list, one explicit generator, and when to stop.

Knows nothing about models, text or sound. A `Sampler` belongs to one request and holds all of its state, so what
it draws depends on the logits of its own row alone. Nothing here waits for the device: ids go in as Python
numbers, masks are made once, and the drawn id stays a tensor until the caller fetches it.

Order of the rules as in the release: float32 logits, repetition mask, allowed ids, temperature, top-k, top-p.
Legend: V vocabulary. Source: formats.md section 4.5.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stepaudio.lm.base import IdRange, SamplingParams, StopReason
from tokenizer.errors import CheckpointError, RequestError

LOOP_PERIODS = 16  # longest run of tokens that the loop guard looks for

Rule = Callable[[Tensor, Sequence[int], int], Tensor]  # logits [V], all ids so far, how many are new -> logits [V]


class Repetition:
    """Forbids the last id where `forbidden_by_repetition` says so."""

    def __init__(self, window: int, share: float) -> None:
        self.window, self.share = window, share

    def __call__(self, logits: Tensor, ids: Sequence[int], new: int) -> Tensor:
        forbidden = forbidden_by_repetition(ids, self.window, self.share)
        if forbidden is not None:
            logits[forbidden] = -math.inf
        return logits


class Allowed:
    """Leaves one set of ids at each position of a cycle; a plain set is a cycle of one."""

    def __init__(self, sets: Sequence[Iterable[IdRange]], vocab_size: int, device: torch.device) -> None:
        self.forbidden = [_outside(ranges, vocab_size).to(device) for ranges in sets]

    def __call__(self, logits: Tensor, ids: Sequence[int], new: int) -> Tensor:
        return logits.masked_fill_(self.forbidden[new % len(self.forbidden)], -math.inf)


class Temperature:
    """Divides the logits."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, logits: Tensor, ids: Sequence[int], new: int) -> Tensor:
        return logits.div_(self.temperature)


class Top:
    """Keeps the `k` likeliest ids and, of those, the smallest set with a mass of at least `p`; equals stay together."""

    def __init__(self, k: int, p: float, vocab_size: int) -> None:
        self.k, self.p = min(k or vocab_size, vocab_size), p

    def __call__(self, logits: Tensor, ids: Sequence[int], new: int) -> Tensor:
        values = logits.topk(self.k).values
        logits.masked_fill_(logits < values[-1], -math.inf)
        if self.p < 1:
            mass = (values - values[0]).exp() * logits.softmax(0).max()  # probability of each of the top values
            before = mass.cumsum(0) - mass
            lowest = values.masked_fill(before >= self.p, math.inf).min()
            logits.masked_fill_(logits < lowest, -math.inf)
        return logits


class LoopGuard:
    """Sees when the newest tokens are one run of up to 16, so many times in a row."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._ids: list[int] = []
        self._same = [0] * (LOOP_PERIODS + 1)  # for each period, how long each id has equalled the one a period back

    def push(self, index: int) -> bool:
        """Takes the next id; True once there is a loop."""
        found = False
        for period in range(1, min(LOOP_PERIODS, len(self._ids)) + 1):
            self._same[period] = self._same[period] + 1 if self._ids[-period] == index else 0
            found |= self._same[period] >= period * (self.times - 1)
        self._ids = [*self._ids[-LOOP_PERIODS:], index]
        return found


class Ending:
    """Says of each drawn id whether it belongs to the output, and when a request is over."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params, self.vocab_size = params, vocab_size
        self.new = 0  # ids of the output so far
        self._guard = LoopGuard(params.loop_guard) if params.loop_guard else None

    def accept(self, index: int) -> tuple[bool, StopReason | None]:
        """Takes the fetched id: whether it is part of the output, and why to stop after it, if so.

        Raises CheckpointError for the id that logits without any finite value lead to.
        """
        if not 0 <= index < self.vocab_size:
            raise CheckpointError(
                "the language model's logits are not finite: its weights are damaged, or need a wider --dtype"
            )
        if index in self.params.stop_ids:
            return False, StopReason.STOP
        self.new += 1
        if self._guard and self._guard.push(index):
            return True, StopReason.LOOP
        return True, StopReason.LENGTH if self.new >= self.params.max_new_tokens else None


class Sampler:
    """Draws the tokens of one request and says when it is over."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """Raises RequestError for params outside their ranges. `device` is where the logits will be."""
        check_params(params, vocab_size)
        self.params = params
        self._ending = Ending(params, vocab_size)
        self._ids = list(prompt)
        self._vocab_size = vocab_size
        self._rules = _rules(params, vocab_size, torch.device(device))
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)

    def draw(self, logits: Tensor) -> Tensor:
        """Logits [V] of any float type -> id, an int64 scalar on their device; V if the logits are not finite."""
        logits = logits.to(torch.float32, copy=True)
        for rule in self._rules:
            logits = rule(logits, self._ids, self._ending.new)
        if self.params.temperature == 0:
            best, index = logits.max(0)  # the first of equals
            return index.where(best.isfinite(), self._vocab_size)
        uniform = torch.rand((), generator=self._generator).item()  # float32: below 1 by more than rounding can add
        return draw_at(logits, uniform)

    def accept(self, index: int) -> tuple[bool, StopReason | None]:
        """Takes the fetched id, as `Ending.accept` does."""
        emitted, stop = self._ending.accept(index)
        if emitted:
            self._ids.append(index)
        return emitted, stop


def draw_at(logits: Tensor, uniform: float) -> Tensor:
    """The id at which the cumulated probability, in the order of ids, passes `uniform`. [V] -> int64 scalar.

    One number decides, so the draw depends on neither the device's generator nor other rows.
    Logits that are NaN give V, an id that does not exist.
    """
    wide = torch.float64 if logits.device.type != "mps" else torch.float32
    cumulated = logits.softmax(0).cumsum(0, dtype=wide)
    return torch.searchsorted(cumulated, (cumulated[-1] * uniform)[None], right=True)[0]


def forbidden_by_repetition(ids: Sequence[int], window: int, share: float) -> int | None:
    """The last id, if more than `share` of the last `window` ids, prompt included, equal it; else None.

    None as well while there are fewer than `window` ids, and for a window of 0, which is off.
    """
    if window == 0 or len(ids) < window:
        return None
    last = ids[-1]
    return last if list(ids[-window:]).count(last) / window > share else None


def allowed_at(params: SamplingParams, position: int) -> tuple[IdRange, ...]:
    """Ranges an id may come from at a position of the output, stop ids apart; empty = any."""
    return (params.cycle[position % len(params.cycle)],) if params.cycle else params.allowed


def may_stop_at(params: SamplingParams, position: int) -> bool:
    """Whether a stop id may come at a position of the output: not inside a cycle."""
    return not params.cycle or position % len(params.cycle) == 0


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError that names the value and its range."""
    _check("temperature", params.temperature, 0, 100)
    _check("top_k", params.top_k, 0, math.inf, whole=True)
    if params.top_p == 0:
        raise RequestError("top_p 0 must be above 0 and at most 1 (temperature 0 takes the likeliest token)")
    _check("top_p", params.top_p, 0, 1)
    _check("repetition_window", params.repetition_window, 0, math.inf, whole=True)
    _check("repetition_share", params.repetition_share, 0, 1)
    _check("loop_guard", params.loop_guard, 0, math.inf, whole=True)
    if params.loop_guard == 1:
        raise RequestError("loop_guard 1 must be 0 (off) or at least 2: one run alone is no loop")
    _check("max_new_tokens", params.max_new_tokens, 1, math.inf, whole=True)
    if params.seed is not None:
        _check("seed", params.seed, 0, 2**63 - 1, whole=True)
    for index in params.stop_ids:
        _check("stop id", index, 0, vocab_size - 1, whole=True)
    for start, end in (*params.allowed, *params.cycle):
        if not 0 <= start < end <= vocab_size:
            raise RequestError(f"id range {start}..{end} must not be empty and must lie in 0..{vocab_size}")
    if params.allowed and params.cycle:
        raise RequestError("give either allowed or cycle: a cycle says at every position what is allowed")
    if params.repetition_window and any(end - start < 2 for start, end in (*params.allowed, *params.cycle)):
        raise RequestError("id ranges must hold at least two ids when the repetition rule may forbid one of them")


def check_room(prompt: int, params: SamplingParams, max_context: int) -> None:
    """Raises RequestError, with how many tokens over, unless prompt and new tokens fit the context."""
    if prompt == 0:
        raise RequestError("the prompt is empty: a language model needs at least one token")
    over = prompt + params.max_new_tokens - max_context
    if over > 0:
        raise RequestError(
            f"{prompt} prompt tokens and max_new_tokens {params.max_new_tokens} are {over} over the context "
            f"of {max_context}: shorten the input or lower max_new_tokens"
        )


def _check(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        limit = f"from {low} up" if high == math.inf else f"in {low}..{high}"
        raise RequestError(f"{name} {value!r} must be a {'whole ' if whole else ''}number {limit}")


def _rules(params: SamplingParams, vocab_size: int, device: torch.device) -> list[Rule]:
    rules: list[Rule] = []
    if params.repetition_window:
        rules.append(Repetition(params.repetition_window, params.repetition_share))
    if params.allowed or params.cycle:
        stops = [(index, index + 1) for index in params.stop_ids]
        sets = [
            (*allowed_at(params, position), *(stops if may_stop_at(params, position) else ()))
            for position in range(len(params.cycle) or 1)
        ]
        rules.append(Allowed(sets, vocab_size, device))
    if params.temperature:
        rules.append(Temperature(params.temperature))
        if 0 < params.top_k < vocab_size or params.top_p < 1:
            rules.append(Top(params.top_k, params.top_p, vocab_size))
    return rules


def _outside(ranges: Iterable[IdRange], vocab_size: int) -> Tensor:
    mask = torch.ones(vocab_size, dtype=torch.bool)
    for start, end in ranges:
        mask[start:end] = False
    return mask
