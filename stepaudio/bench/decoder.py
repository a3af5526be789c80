"""How fast codes become sound: the flow and the vocoder by length and batch, each way to run them.

The plain modules are the baseline of the same run. A time is that of a whole call from tensors on the host to the
result on the device: copies, launches and the wait at the end included, noise drawn before. With `random` the shapes
are the release's and the weights random, made on the device. Every row is yielded as soon as it is measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cosyvoice.config import CosyVoiceConfig, read_config
from cosyvoice.decoder import FLOW_NAME, VOCODER_NAME
from cosyvoice.flow import FlowRequest, TokenToMel, num_frames
from cosyvoice.flow_engine import FlowEngine
from cosyvoice.hift import HiFTVocoder, SourceDraws
from cosyvoice.vocoder_engine import VocoderEngine
from stepaudio.bench.report import Row, peak_rss_mb, row, seconds_of
from stepaudio.checkpoints import FLOW_DIR, TTS_DIR
from tokenizer.codes import LAYOUT
from tokenizer.errors import RequestError

PROMPT_SECONDS = 4.0
NUM_STEPS = 10
_BATCH = 32
_CODES_PER_SECOND = 41.667


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    dtype: torch.dtype  # of the flow
    lengths: Sequence[float] = (1.0, 10.0, 30.0)  # seconds of speech, batch 1
    batch_seconds: float = 10.0  # of each item of the batch
    batch: int = _BATCH
    repeats: int = 20
    seed: int = 0
    folder: Path | None = None  # a checkpoint's root; None: random weights of the release's shapes
    seconds: float = 60.0  # rows that would begin later are left out, and said to be


@dataclass(frozen=True)
class _Task:
    name: str
    engine: str
    seconds: float
    batch: int
    precision: str = "float32"


def _tasks(plan: Plan, what: str) -> Iterator[_Task]:
    """Baseline first, then the fastest way, then the rest; batches last."""
    if plan.device.type != "cuda":
        yield from (_Task(what, "plain", seconds, 1) for seconds in plan.lengths)
        return
    precisions = ("float32", "float16") if what == "vocoder" else ("float32",)
    for seconds in plan.lengths:
        yield _Task(what, "plain", seconds, 1)
        yield from (_Task(what, "auto", seconds, 1, precision) for precision in precisions)
        yield _Task(what, "graph", seconds, 1)
    yield from (_Task(what, "auto", plan.batch_seconds, plan.batch, precision) for precision in precisions)
    yield _Task(what, "plain", plan.batch_seconds, plan.batch)


def measure(plan: Plan, what: str) -> Iterator[Row]:
    """Rows of "flow" or "vocoder"."""
    begin = time.perf_counter()
    config, model = (_flow if what == "flow" else _vocoder)(plan)
    engines: dict[tuple[str, str], FlowEngine | VocoderEngine] = {}
    for task in _tasks(plan, what):
        name = f"{what}, {_label(task)}"
        if time.perf_counter() - begin > plan.seconds:
            yield {"name": name, "skipped": f"began after {plan.seconds:g} s"}
            continue
        try:
            yield _row(plan, task, name, *_prepared(plan, task, config, model, engines))
        except RequestError as error:
            yield {"name": name, "skipped": str(error)}
        except torch.cuda.OutOfMemoryError:
            yield {"name": name, "skipped": "out of GPU memory"}


def _label(task: _Task) -> str:
    how = task.engine if task.precision == "float32" else f"{task.engine} {task.precision}"
    return f"{task.seconds:g} s, batch {task.batch}, {how}"


def _prepared(
    plan: Plan,
    task: _Task,
    config: CosyVoiceConfig,
    model: TokenToMel | HiFTVocoder,
    engines: dict[tuple[str, str], FlowEngine | VocoderEngine],
) -> tuple[Callable[[], object], FlowEngine | VocoderEngine]:
    """The call to time and the engine that makes it; engines are made once."""
    key = (task.engine, task.precision)
    if isinstance(model, TokenToMel):
        if key not in engines:
            engines[key] = FlowEngine(model, task.engine)
        requests = [_request(plan, config, task.seconds, plan.seed + i) for i in range(task.batch)]
        return partial(engines[key].generate, requests, NUM_STEPS), engines[key]
    if key not in engines:
        engines[key] = VocoderEngine(model, task.engine, task.precision)
    frames = num_frames(_codes(task.seconds), config.flow)
    generator = torch.Generator().manual_seed(plan.seed)
    mel = torch.randn(task.batch, config.hift.in_channels, frames, generator=generator).to(plan.device) - 5.0
    draws = SourceDraws.batch([SourceDraws.draw(config.hift, frames, generator) for _ in range(task.batch)])
    return partial(engines[key].run, mel, draws.to(plan.device)), engines[key]


def _row(plan: Plan, task: _Task, name: str, call: Callable[[], object], engine: FlowEngine | VocoderEngine) -> Row:
    cuda = plan.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    repeats = max(3, plan.repeats // 4) if task.engine == "plain" or task.batch > 1 else plan.repeats
    times = seconds_of(call, repeats, warmup=2, device=plan.device.type)
    extra = {"prompt_s": PROMPT_SECONDS, "steps": NUM_STEPS} if isinstance(engine, FlowEngine) else {}
    done = row(name, times, plan.seed, audio_s=task.seconds, batch=task.batch, engine=engine.engine, **extra)
    done["times_real_time"] = round(task.seconds * task.batch / done["median"], 1)
    done["first_call_s"] = round(first, 2)  # compilation and capture included
    done["dtype"] = str(plan.dtype if isinstance(engine, FlowEngine) else task.precision).removeprefix("torch.")
    done["peak_mb"] = round(torch.cuda.max_memory_allocated(plan.device) / 2**20 if cuda else peak_rss_mb())
    if engine.pool is not None:
        done |= {"graphs": len(engine.pool), "graph_mb": round(engine.pool.bytes / 2**20)}
    return done


def _codes(seconds: float) -> int:
    """Codes of so much sound, whole groups."""
    return max(1, round(seconds * _CODES_PER_SECOND / LAYOUT.group)) * LAYOUT.group


def _request(plan: Plan, config: CosyVoiceConfig, seconds: float, seed: int) -> FlowRequest:
    generator = torch.Generator().manual_seed(seed)
    codes, prompt = _codes(seconds), _codes(PROMPT_SECONDS)
    bands, frames = config.flow.output_size, num_frames(prompt, config.flow)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(config.flow.vocab_size, (count,), generator=generator)

    return FlowRequest(
        codes=draw(codes),
        prompt_codes=draw(prompt),
        prompt_mel=torch.randn(frames, bands, generator=generator) - 5.0,
        embedding=torch.randn(config.flow.spk_embed_dim, generator=generator),
        noise=torch.randn(bands, frames + num_frames(codes, config.flow), generator=generator),
    )


def _flow(plan: Plan) -> tuple[CosyVoiceConfig, TokenToMel]:
    if plan.folder is not None:
        folder = plan.folder / TTS_DIR / FLOW_DIR
        config = read_config(folder)
        return config, TokenToMel.from_file(folder / FLOW_NAME, config.flow, plan.device, plan.dtype)
    torch.manual_seed(plan.seed)
    with torch.device(plan.device):
        model = TokenToMel(CosyVoiceConfig().flow)
    return CosyVoiceConfig(), model.to(plan.device, plan.dtype).eval().requires_grad_(False)


def _vocoder(plan: Plan) -> tuple[CosyVoiceConfig, HiFTVocoder]:
    if plan.folder is not None:
        folder = plan.folder / TTS_DIR / FLOW_DIR
        config = read_config(folder)
        return config, HiFTVocoder.from_file(folder / VOCODER_NAME, config.hift).to(plan.device)
    torch.manual_seed(plan.seed)
    with torch.device(plan.device):
        model = HiFTVocoder(CosyVoiceConfig().hift)
    return CosyVoiceConfig(), model.to(plan.device).eval().requires_grad_(False)
