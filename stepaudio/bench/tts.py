"""How fast text becomes speech: one request, a batch, and, as the baseline in the same run, the plain modules.

With `random` the shapes are the release's and the weights random: a language model that draws audio codes in their
order for as long as the sound shall be, and a decoder of noise. Text, prompts and voices are the bundled ones.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cosyvoice.config import CosyVoiceConfig
from cosyvoice.decoder import SpeechDecoder
from cosyvoice.flow import TokenToMel
from cosyvoice.hift import HiFTVocoder
from stepaudio.bench.lm import GEOMETRIES
from stepaudio.bench.report import Row, peak_rss_mb, row
from stepaudio.checkpoints import BUNDLED
from stepaudio.lm.base import Completion, LanguageModel, SamplingParams, StopReason, Token
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused_load import random_fused
from stepaudio.lm.local import LocalLM
from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.speech import TTSRequest
from tokenizer.codes import LAYOUT
from tokenizer.errors import StepAudioError

SENTENCE = "the capital of france is paris, the opposite of hot is cold and the month after june is july"


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    dtype: torch.dtype
    folder: Path = BUNDLED
    random: bool = False  # the released shapes with random weights
    seconds: float = 10.0  # of speech: exact with random weights, else about so many
    repeats: int = 5
    batch: int = 32
    streams: int = 8  # at once
    seed: int = 0
    baseline: bool = True  # also the plain modules, once

    @property
    def text(self) -> str:
        """Words for about so many seconds; nobody asks what a random model says."""
        if self.random:
            return SENTENCE
        return ". ".join([SENTENCE] * max(1, round(self.seconds / 3.3)))

    def requests(self, count: int) -> list[TTSRequest]:
        return [TTSRequest(self.text, seed=self.seed + number) for number in range(count)]


class ForcedLM:
    """A model that says nothing in particular, for exactly `codes` audio codes in the order 2 + 3."""

    def __init__(self, lm: LanguageModel, audio_base: int, codes: int) -> None:
        """`audio_base` is the id of the first audio code in the engine's vocabulary."""
        self.lm, self.base, self.codes, self.max_context = lm, audio_base, codes, lm.max_context

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[Token]:
        for token in self.lm.stream(prompt, self._forced(params), cancelled):
            yield Token(None, self._stop(token.stop)) if token.id is None else Token(self._own(token.id))

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        done = self.lm.generate(prompts, [self._forced(one) for one in params])
        return [Completion(tuple(map(self._own, one.ids)), StopReason.STOP) for one in done]

    def _forced(self, params: SamplingParams) -> SamplingParams:
        cycle = tuple((LAYOUT.id_base + first, LAYOUT.id_base + end) for first, end in LAYOUT.pattern)
        return replace(params, cycle=cycle, allowed=(), stop_ids=(), loop_guard=0, max_new_tokens=self.codes)

    def _own(self, index: int) -> int:
        return index - LAYOUT.id_base + self.base

    @staticmethod
    def _stop(stop: StopReason | None) -> StopReason | None:
        return StopReason.STOP if stop is StopReason.LENGTH else stop


def open_engine(plan: Plan, plain: bool = False) -> StepAudioTTS:
    """The engine to measure; `plain` takes the modules as they are written, for the language model and the decoder."""
    engine = StepAudioTTS.from_dir(
        plan.folder, plan.device, plan.dtype, batch_size=plan.batch, lm_options={"engine": "eager"} if plain else None
    )
    how = "plain" if plain else "auto"
    if not plan.random:
        old = engine.decoder
        engine.decoder = SpeechDecoder(old.config, old.flow, old.vocoder, "", how)
        return engine
    engine.max_attempts = 1
    engine.lm = ForcedLM(_random_lm(plan, plain), engine.vocab.audio_base, _codes(plan.seconds))
    engine.decoder = _random_decoder(plan, how)
    return engine


def _codes(seconds: float) -> int:
    return round(seconds * LAYOUT.rate / LAYOUT.group) * LAYOUT.group


def _random_lm(plan: Plan, plain: bool) -> LanguageModel:
    geometry = GEOMETRIES["3b"]
    if not plain:
        return FastLM(random_fused(geometry, plan.device, plan.dtype, seed=plan.seed))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(plan.dtype)
        with torch.device(plan.device):
            return LocalLM(Step1ForCausalLM(Step1Config(**vars(geometry))))
    finally:
        torch.set_default_dtype(default)


def _random_decoder(plan: Plan, how: str) -> SpeechDecoder:
    torch.manual_seed(plan.seed)
    config = CosyVoiceConfig()
    with torch.device(plan.device):
        flow, vocoder = TokenToMel(config.flow), HiFTVocoder(config.hift)
    flow.to(plan.dtype).eval().requires_grad_(False)
    vocoder.to(plan.device).eval().requires_grad_(False)  # the STFT bases are made on the CPU
    return SpeechDecoder(config, flow, vocoder, "", how)


def measure(plan: Plan) -> Iterator[Row]:
    """One request at a time, then a batch; the plain modules first. Rows come as they are measured."""
    if plan.baseline:
        engine = open_engine(plan, plain=True)
        yield _one(plan, engine, "text to speech, batch 1, plain", repeats=1)
        del engine
        tidy(plan.device)
    engine = open_engine(plan)
    yield _one(plan, engine, "text to speech, batch 1", plan.repeats)
    yield _batch(plan, engine)


def tidy(device: torch.device) -> None:
    """Gives back what a deleted engine held, and forgets its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_mb(device: torch.device) -> int:
    """Peak memory: of the device, or of the process on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb())


def _one(plan: Plan, engine: StepAudioTTS, name: str, repeats: int) -> Row:
    times, seconds = [], 0.0
    for number in range(repeats + 1):
        begin = time.perf_counter()
        [speech] = _spoken(engine.synthesize_batch(plan.requests(1)))
        if number:
            times.append(time.perf_counter() - begin)
            seconds += speech
    return _row(plan, name, times, seconds / repeats, 1)


def _batch(plan: Plan, engine: StepAudioTTS) -> Row:
    times, seconds = [], 0.0
    for number in range(min(plan.repeats, 3) + 1):
        begin = time.perf_counter()
        spoken = _spoken(engine.synthesize_batch(plan.requests(plan.batch)))
        if number:
            times.append(time.perf_counter() - begin)
            seconds += sum(spoken)
    return _row(plan, f"text to speech, batch {plan.batch}", times, seconds / len(times), plan.batch)


def _spoken(speeches: Sequence[object]) -> list[float]:
    for speech in speeches:
        if isinstance(speech, StepAudioError):
            raise speech
    return [speech.seconds for speech in speeches]  # type: ignore[attr-defined]


def _row(plan: Plan, name: str, times: list[float], seconds: float, batch: int) -> Row:
    """`rtf`: seconds of work for a second of speech; `speech_per_s`: the other way round."""
    found = row(name, times, plan.seed, audio_s=round(seconds, 3), batch=batch, device=str(plan.device))
    found["rtf"] = round(found["median"] / seconds, 4)
    found["speech_per_s"] = round(seconds / found["median"], 2)
    return {**found, "weights": "random, released shapes" if plan.random else str(plan.folder.name), **_how(plan)}


def _how(plan: Plan) -> Row:
    return {"dtype": str(plan.dtype)[6:], "peak_mb": memory_mb(plan.device)}
