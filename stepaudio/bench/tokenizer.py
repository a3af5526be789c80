"""How fast sound becomes codes: the dual tokenizer on one clip and on a batch, plain modules and the fast way.

A time is that of a whole `encode` from samples on the host to codes on the host. With `random` the shapes are the
release's and the weights random, made on the device. `codes_equal` compares the codes with those of the baseline.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepaudio.bench.codec import noise_clip
from stepaudio.bench.report import Row, peak_rss_mb, row, seconds_of
from stepaudio.checkpoints import TOKENIZER_DIR
from stepaudio.make_checkpoint.random_weights import cmvn
from tokenizer.audio import TOKENIZER_RATE, Audio
from tokenizer.codes import LAYOUT
from tokenizer.dual import DualTokenizer
from tokenizer.fbank import FrontEnd
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.sanm import SanmConfig, SanmEncoder
from tokenizer.semantic import SemanticConfig, SemanticEncoder, SemanticTokenizer, TorchBackend
from tokenizer.split import split


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    lengths: Sequence[float] = (1.0, 10.0, 30.0)  # seconds, one clip
    batch_seconds: float = 10.0
    batch: int = 32
    repeats: int = 20
    seed: int = 0
    folder: Path | None = None  # a checkpoint's root; None: random weights of the release's shapes
    seconds: float = 60.0  # rows that would begin later are left out, and said to be


def measure(plan: Plan) -> Iterator[Row]:
    """The baseline of each case and the fast way, if this device has one. Rows come as they are measured."""
    begin = time.perf_counter()
    cases = [(seconds, 1) for seconds in plan.lengths] + [(plan.batch_seconds, plan.batch)]
    engines = ("plain", "auto") if plan.device.type == "cuda" else ("plain",)
    tokenizers = dict(zip(engines, _open(plan, engines)))
    for seconds, batch in cases:
        clips = [Audio(noise_clip(seconds, plan.seed + i), TOKENIZER_RATE) for i in range(batch)]
        expected: list[np.ndarray] = []
        for engine, tokenizer in tokenizers.items():
            name = f"dual tokenizer, {seconds:g} s, batch {batch}, {engine}"
            if time.perf_counter() - begin > plan.seconds:
                yield {"name": name, "skipped": f"began after {plan.seconds:g} s"}
                continue
            done, codes = _row(plan, name, tokenizer, clips, 3 if engine == "plain" else plan.repeats)
            if expected:
                done["codes_equal"] = round(float(np.mean(np.concatenate(expected) == np.concatenate(codes))), 5)
            expected = expected or codes
            yield done


def _row(
    plan: Plan, name: str, tokenizer: DualTokenizer, clips: list[Audio], repeats: int
) -> tuple[Row, list[np.ndarray]]:
    cuda = plan.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    began = time.perf_counter()
    codes = [found.interleaved for found in tokenizer.encode(clips, seed=plan.seed)]
    first = time.perf_counter() - began
    times = seconds_of(lambda: tokenizer.encode(clips, seed=plan.seed), repeats, warmup=1, device=plan.device.type)
    audio = sum(clip.seconds for clip in clips)
    done = row(name, times, plan.seed, audio_s=round(audio / len(clips), 3), batch=len(clips))
    done["times_real_time"] = round(audio / done["median"], 1)
    done["first_call_s"] = round(first, 2)
    done["peak_mb"] = round(torch.cuda.max_memory_allocated(plan.device) / 2**20 if cuda else peak_rss_mb())
    pools = [part.pool for part in (tokenizer.linguistic.batch, tokenizer.semantic.backend) if part and part.pool]
    done |= {"graphs": sum(map(len, pools)), "graph_mb": round(sum(pool.bytes for pool in pools) / 2**20)}
    return done, codes


def _open(plan: Plan, engines: Sequence[str]) -> Iterator[DualTokenizer]:
    """One tokenizer for each engine, of the same weights."""
    if plan.folder is not None:
        for engine in engines:
            yield DualTokenizer.from_dir(plan.folder / TOKENIZER_DIR, plan.device, engine=engine)
        return
    torch.manual_seed(plan.seed)
    with torch.device(plan.device):
        encoder, semantic = SanmEncoder(SanmConfig()), SemanticEncoder(SemanticConfig())
        centroids = torch.randn(LAYOUT.linguistic_size, SanmConfig.size)
    for model in (encoder, semantic):
        model.eval().requires_grad_(False)
    for engine in engines:
        ours, theirs = copy.deepcopy(encoder), copy.deepcopy(semantic)
        yield DualTokenizer(
            LinguisticTokenizer(FrontEnd(cmvn()), ours, centroids, engine=engine),
            SemanticTokenizer(TorchBackend(theirs if engine == "plain" else split(theirs)), plan.device, engine),
        )
