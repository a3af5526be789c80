"""How fast the language model is: the eager baseline and the fast engine, by batch, context and precision.

A step is measured where it counts, deep in a context, without running a prompt of that length first: its keys are
there as memory, their values are none of the clock's business. Every row is yielded as soon as it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepaudio.bench.report import Row as Report
from stepaudio.bench.report import seconds_of, tidy
from stepaudio.lm.base import SamplingParams
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused import FusedStep1
from stepaudio.lm.fused_load import load_fused, random_fused
from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.load import load_model
from stepaudio.lm.local import LocalLM
from stepaudio.lm.memory import free_bytes
from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM
from stepaudio.lm.sampling import Ending
from stepaudio.lm.session import Row, Session
from tokenizer.errors import RequestError

GEOMETRIES = {  # of the released models
    "3b": Geometry(74752, 3072, 8192, 48, 4, 32, 32768),
    "130b": Geometry(74752, 12288, 31232, 96, 8, 88, 32768),
}
_SAMPLING = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, repetition_window=10, stop_ids=())
_WARMUP, _STEPS, _EAGER_STEPS = 6, 40, 12
_PREFILL = 1000  # tokens
_COPIED = {"cuda": 2**31, "cpu": 2**28}  # bytes


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    dtype: torch.dtype
    batches: Sequence[int]
    contexts: Sequence[int]
    precisions: Sequence[str]
    seed: int = 0
    folder: Path | None = None  # a checkpoint, or
    random: str | None = None  # a geometry with random weights
    seconds: float = 100.0  # rows that would begin later are left out, and said to be

    @property
    def geometry(self) -> Geometry:
        if self.random is not None:
            return GEOMETRIES[self.random]
        assert self.folder is not None, "a folder or a geometry"
        return Geometry.from_config(read_config(self.folder))


def measure(plan: Plan) -> Iterator[Report]:
    """Copy bandwidth, the eager baseline, then the fast engine in each precision; one row each."""
    began = time.perf_counter()
    copy = copy_bandwidth(plan.device)
    yield {"name": "memory copy", "unit": "TB/s", "median": round(copy / 1e12, 4), "device": str(plan.device)}
    for name, task in _tasks(plan, copy):
        tidy(plan.device)
        if time.perf_counter() - began > plan.seconds:
            yield {"name": name, "skipped": f"{plan.seconds:g} s were over"}
            continue
        try:
            yield from task()
        except (RequestError, torch.OutOfMemoryError) as error:
            yield {"name": name, "skipped": str(error).splitlines()[0]}


def _tasks(plan: Plan, copy: float) -> Iterator[tuple[str, Callable[[], Iterator[Report]]]]:
    """Names and measurements in order; a precision's model is made once, by its first measurement."""
    yield f"lm eager, batch 1, context {plan.contexts[0]}", lambda: _eager(plan, copy)
    for index, precision in enumerate(plan.precisions):
        label = str(plan.dtype)[6:] if precision == "bfloat16" else precision
        made: list[FusedStep1] = []

        def model(precision: str = precision, made: list[FusedStep1] = made) -> FusedStep1:
            if not made:
                made.append(_fused(plan, precision))
            return made[0]

        for context in plan.contexts:
            for batch in plan.batches:
                if index == 0 or (batch in (1, 32) and context == plan.contexts[0]):
                    name = f"lm {label}, batch {batch}, context {context}"
                    yield name, lambda a=name, b=batch, c=context, m=model: _fast(plan, copy, a, m(), b, c)
        yield f"lm {label}, prefill", lambda a=label, m=model: _prefill(plan, f"lm {a}, prefill", m())
        made.clear()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by copying a large tensor."""
    source = torch.empty(_COPIED["cuda" if device.type == "cuda" else "cpu"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = seconds_of(lambda: target.copy_(source), 10, warmup=3, device=device.type)
    return 2 * source.nbytes / statistics.median(times)


def _eager(plan: Plan, copy: float) -> Iterator[Report]:
    """A few tokens of `LocalLM`."""
    context, geometry = plan.contexts[0], plan.geometry
    needed = geometry.parameters * plan.dtype.itemsize
    if needed > free_bytes(plan.device):
        raise RequestError(f"the eager model takes {needed / 1e9:.0f} GB, more than is free")
    if plan.folder is not None:
        lm = LocalLM(load_model(plan.folder, device=plan.device, dtype=plan.dtype))
    else:
        lm = LocalLM(_random_eager(plan))
    params = _params(plan, 1, _EAGER_STEPS)
    times, last = [], time.perf_counter()
    for token in lm.stream([5] * (context - _EAGER_STEPS), params[0]):
        now = time.perf_counter()
        if token.id is not None:
            times.append(now - last)
        last = now
    read = needed + context * geometry.cache_bytes(plan.dtype.itemsize)
    yield _row(plan, f"lm eager, batch 1, context {context}", times[3:], 1, read, copy, precision=str(plan.dtype)[6:])


def _random_eager(plan: Plan) -> Step1ForCausalLM:
    """The transformers model with random weights, made on the device."""
    geometry, default = plan.geometry, torch.get_default_dtype()
    config = Step1Config(**vars(geometry))
    torch.manual_seed(plan.seed)
    try:
        torch.set_default_dtype(plan.dtype)
        with torch.device(plan.device):
            return Step1ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def _fused(plan: Plan, precision: str) -> FusedStep1:
    if plan.folder is not None:
        return load_fused(plan.folder, plan.device, plan.dtype, precision, progress=False)
    return random_fused(plan.geometry, plan.device, plan.dtype, precision, seed=plan.seed)


class _Deep(Session):
    """A loop whose prompts are taken to be in the cache already."""

    def _prefill(self, rows: list[Row], count: int) -> None:
        assert self.cache is not None
        for row in rows:
            self.cache.lengths[row.slot] = len(row.prompt)
        self._fetch(rows)
        self._pending.clear()  # nothing was drawn


def _fast(plan: Plan, copy: float, name: str, model: FusedStep1, batch: int, context: int) -> Iterator[Report]:
    """Steps of the decode loop at a context."""
    steps = _WARMUP + _STEPS
    with _on_stream(plan.device), torch.inference_mode():
        session = _Deep(model)
        params = _params(plan, batch, steps + 2)
        prompt = [5] * (context - steps - 2)
        session.join([Row(prompt, one, Ending(one, session.vocab_size)) for one in params])
        times, last = [], time.perf_counter()
        for _ in range(steps):
            session.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        session.drain()
        graphs = {"graphs": len(session.graphs), "graph_mb": round(session.graphs.nbytes / 2**20)}
    cached = batch * context * model.geometry.cache_bytes(model.dtype.itemsize)
    precision = name.split()[1].rstrip(",")
    read = model.bytes_per_token + cached
    yield _row(plan, name, times[_WARMUP:], batch, read, copy, precision=precision, context=context, **graphs)


def _prefill(plan: Plan, name: str, model: FusedStep1) -> Iterator[Report]:
    """From a prompt to its first token."""
    tokens = min(_PREFILL, model.geometry.max_seq_len - 2)
    lm = FastLM(model)
    prompt = torch.randint(0, lm.vocab_size, (tokens,), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    [params] = _params(plan, 1, 1)
    times = seconds_of(lambda: lm.generate([prompt], [params]), 10, warmup=3, device=plan.device.type)
    yield _row(plan, f"{name} {tokens} tokens", times, tokens, None, None)


def _params(plan: Plan, count: int, tokens: int) -> list[SamplingParams]:
    return [replace(_SAMPLING, seed=plan.seed + n, max_new_tokens=tokens) for n in range(count)]


def _row(
    plan: Plan, name: str, times: Sequence[float], tokens: int, read: int | None, copy: float | None, **more: Any
) -> Report:
    """Milliseconds of a step that gives `tokens` tokens and reads `read` bytes of weights and cache."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    row: Report = {
        "name": name,
        "unit": "ms",
        "median": round(1e3 * median, 4),
        "p95": round(1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4),
        "min": round(1e3 * ordered[0], 4),
        "repeats": len(ordered),
        "seed": plan.seed,
        "tokens_per_s": round(tokens / median, 1),
        "weights": plan.random or str(plan.folder and plan.folder.name),
        "device": str(plan.device),
        **more,
    }
    if read is not None and copy is not None:
        row["tb_per_s"] = round(read / median / 1e12, 4)
        row["share_of_copy"] = round(read / median / copy, 3)
    if plan.device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated(plan.device) / 1e9, 2)
    return row


def _on_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Captures need a stream of their own."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
