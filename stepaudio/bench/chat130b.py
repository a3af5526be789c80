"""The 130B chat model's shapes with random weights: int4 on one GPU, and bfloat16 split over two where there are two.

Tokens are drawn as in a chat, after a prompt that really runs; a token's time is that between two of a stream. Each
row is yielded as soon as it is measured. Weights are made on the devices, so no checkpoint is needed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stepaudio.bench.lm import GEOMETRIES, copy_bandwidth
from stepaudio.bench.report import Row, seconds_of, tidy
from stepaudio.lm.base import SamplingParams
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused_load import random_fused
from stepaudio.lm.fused_plan import check_split
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.parallel import ParallelLM
from stepaudio.lm.workers import devices_for
from tokenizer.errors import RequestError, StepAudioError

CONTEXTS = (256, 1024)  # tokens, those that are drawn included
PREFILL = 1000
_WARMUP, _STEPS = 8, 40


@dataclass(frozen=True)
class Case:
    """One way to run the model."""

    precision: str
    world: int  # GPUs

    @property
    def name(self) -> str:
        return f"130b {self.precision}, {self.world} GPU" + "s" * (self.world > 1)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    contexts: Sequence[int] = CONTEXTS
    prefill: int = PREFILL
    geometry: Geometry = GEOMETRIES["130b"]
    cases: Sequence[Case] = (Case("int4", 1),)
    seed: int = 0


def plan_for(
    device: torch.device, contexts: Sequence[int] = CONTEXTS, layers: int | None = None, seed: int = 0
) -> Plan:
    """The cases this machine has GPUs for; `layers` makes the model shorter, for a quick look.

    Raises RequestError without a CUDA device, for a context too short to draw in, and for more layers than there are.
    """
    geometry = GEOMETRIES["130b"]
    if device.type != "cuda":
        raise RequestError(f"chat130b needs a CUDA device, not {device}: the model has 132 billion weights")
    if min(contexts) < 2 * (_WARMUP + _STEPS) or max(contexts) > geometry.max_seq_len:
        raise RequestError(f"--context must lie in {2 * (_WARMUP + _STEPS)}..{geometry.max_seq_len} for chat130b")
    if layers is not None and not 1 <= layers <= geometry.num_hidden_layers:
        raise RequestError(f"--layers {layers} must lie in 1..{geometry.num_hidden_layers}")
    cases = [Case("int4", 1)] + [Case("bfloat16", 2)] * (torch.cuda.device_count() >= 2)
    geometry = replace(geometry, num_hidden_layers=layers or geometry.num_hidden_layers)
    return Plan(device, contexts=contexts, geometry=geometry, cases=cases, seed=seed)


def measure(plan: Plan) -> Iterator[Row]:
    """Copy bandwidth, then for each case the making of the model, its tokens and its prefill."""
    copy = copy_bandwidth(plan.device)
    yield {"name": "memory copy", "unit": "TB/s", "median": round(copy / 1e12, 4), "device": str(plan.device)}
    tidy(plan.device)
    for case in plan.cases:
        try:
            yield from _measured(plan, case, copy)
        except (StepAudioError, torch.OutOfMemoryError) as error:
            yield {"name": case.name, "skipped": str(error).splitlines()[0]}
        tidy(plan.device)


def _measured(plan: Plan, case: Case, copy: float) -> Iterator[Row]:
    began = time.perf_counter()
    lm = _opened(plan, case)
    try:
        yield _row(plan, case, "made", [time.perf_counter() - began])
        for context in plan.contexts:
            times = _token_times(lm, plan, context)
            read = lm.model.bytes_per_token + context * plan.geometry.cache_bytes(plan.dtype.itemsize) // case.world
            speed = read / statistics.median(times)  # of each GPU
            more = {"tb_per_s": round(speed / 1e12, 4), "share_of_copy": round(speed / copy, 3)}
            yield _row(plan, case, f"token at context {context}", times, **more)
        tokens = min(plan.prefill, plan.geometry.max_seq_len - 1)
        prompt, params = _prompt(lm, plan, tokens), _params(plan, 1)
        times = seconds_of(lambda: lm.generate([prompt], [params]), 5, warmup=2, device=plan.device.type)
        yield _row(plan, case, f"prefill of {tokens} tokens", times)
    finally:
        if isinstance(lm, ParallelLM):
            lm.close()


def _opened(plan: Plan, case: Case) -> FastLM:
    build = functools.partial(random_fused, plan.geometry, dtype=plan.dtype, precision=case.precision, seed=plan.seed)
    check_split(plan.geometry, case.world)
    if case.world > 1:
        return ParallelLM(build, devices_for(plan.device, case.world))
    return FastLM(build(device=plan.device))


def _token_times(lm: FastLM, plan: Plan, context: int) -> list[float]:
    """Seconds between tokens, once graphs are captured, up to the context."""
    tokens = _WARMUP + _STEPS
    times, last = [], time.perf_counter()
    for token in lm.stream(_prompt(lm, plan, context - tokens), _params(plan, tokens)):
        now = time.perf_counter()
        if token.id is not None:
            times.append(now - last)
        last = now
    return times[_WARMUP:]


def _prompt(lm: FastLM, plan: Plan, tokens: int) -> list[int]:
    return torch.randint(0, lm.vocab_size, (tokens,), generator=torch.Generator().manual_seed(plan.seed)).tolist()


def _params(plan: Plan, tokens: int) -> SamplingParams:
    return SamplingParams(top_p=0.9, stop_ids=(), max_new_tokens=tokens, seed=plan.seed)


def _row(plan: Plan, case: Case, what: str, times: Sequence[float], **more: float) -> Row:
    ordered = sorted(1e3 * seconds for seconds in times)
    row: Row = {
        "name": f"{case.name}, {what}",
        "unit": "ms",
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        "min": round(ordered[0], 3),
        "repeats": len(ordered),
        "seed": plan.seed,
        "layers": plan.geometry.num_hidden_layers,
        "device": str(plan.device),
        **more,
    }
    if plan.device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated(plan.device) / 1e9, 2)  # of the first GPU
    return row
