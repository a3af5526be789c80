"""A file through the codec: sound or codes in, sound and codes out, with the time of every stage.

Knows files and stages; what the stages do is in `tokenizer` and `cosyvoice`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cosyvoice.decoder import SpeechDecoder
from cosyvoice.prompt import VoicePrompt
from stepaudio.checkpoints import FLOW_DIR, require_checkpoint
from tokenizer.audio import WRITTEN, Audio, read_audio, write_audio
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError
from tokenizer.files import atomic_write, check_target

PROMPT_SECONDS = 10.0  # of the clip, as its own voice prompt
PIECE_CODES = round(30 * LAYOUT.rate)  # decoded at once; attention grows with the square of the length


@dataclass
class Report:
    """What happened: counts, seconds of sound, seconds of each stage."""

    input_seconds: float
    codes: AudioCodes
    output_seconds: float = 0.0
    output_samples: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        head = (
            f"{self.input_seconds:.2f} s -> {len(self.codes.linguistic)} linguistic + {len(self.codes.semantic)} "
            f"semantic codes -> {self.output_seconds:.2f} s ({self.output_samples} samples)"
        )
        work = {name: spent for name, spent in self.stages.items() if name != "load"}
        lines = [f"  {name:<10}{spent:8.3f} s" for name, spent in self.stages.items()]
        total = sum(work.values())
        rtf = f"  RTF {total / max(self.output_seconds, 1e-9):.3f} ({total:.3f} s of work, loading apart)"
        return "\n".join([head, *lines, rtf])


def roundtrip(
    root: Path,
    input_path: Path,
    output_path: Path,
    *,
    codes_path: Path | None = None,
    prompt_path: Path | None = None,
    seed: int = 0,
    num_steps: int = 10,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Writes `output_path` (and `codes_path`), both or neither, and reports.

    Everything that can be wrong with the request is checked before a model is loaded. Raises RequestError for bad
    input and CheckpointError for a bad model folder.
    """
    check_target(output_path, WRITTEN)
    if codes_path is not None:
        check_target(codes_path, (".json",))
    clip = None if input_path.suffix == ".json" else read_sound(input_path)
    codes = read_codes(input_path) if clip is None else None
    prompt_clip = read_sound(prompt_path) if prompt_path else clip and first_seconds(clip)
    stages: dict[str, float] = {}
    with timed(stages, "load"):
        decoder = SpeechDecoder.from_dir(require_checkpoint(root, "tts") / FLOW_DIR, device=device, dtype=dtype)
        tokenizer = prompt_clip and DualTokenizer.from_dir(require_checkpoint(root, "tokenizer"), device=device)
    if codes is None:
        with timed(stages, "tokenize"):
            codes = tokenizer.encode(clip, seed=seed)
    prompt: VoicePrompt | None = None
    if prompt_clip is not None:
        with timed(stages, "prompt"):
            prompt = decoder.voice_prompt(prompt_clip, tokenizer, seed=seed)
    sound = decode(decoder, codes, prompt, seed, num_steps, stages)
    if codes_path is None:
        write_audio(output_path, sound)
    else:
        with write_codes(codes_path, codes):
            write_audio(output_path, sound)
    return Report(clip.seconds if clip else codes.seconds, codes, sound.seconds, len(sound), stages)


def decode(
    decoder: SpeechDecoder,
    codes: AudioCodes,
    prompt: VoicePrompt | None,
    seed: int = 0,
    num_steps: int = 10,
    timings: dict[str, float] | None = None,
) -> Audio:
    """Sound of codes of any length, in pieces of 30 s; each piece is rounded down to a whole mel frame."""
    whole = codes.interleaved
    pieces = [AudioCodes(whole[start : start + PIECE_CODES]) for start in range(0, max(1, len(whole)), PIECE_CODES)]
    sounds = [
        decoder.decode(piece, prompt, seed=seed + index, num_steps=num_steps, timings=timings)
        for index, piece in enumerate(pieces)
    ]
    return Audio(np.concatenate([sound.samples for sound in sounds]), decoder.sample_rate)


def read_sound(path: Path) -> Audio:
    """A sound long enough for one group of codes; RequestError otherwise."""
    audio = read_audio(path)
    if audio.seconds < LAYOUT.group_seconds:
        raise RequestError(
            f"{path} lasts {audio.seconds * 1000:.0f} ms: at least {LAYOUT.group_seconds * 1000:.0f} ms are needed"
        )
    return audio


def first_seconds(audio: Audio, seconds: float = PROMPT_SECONDS) -> Audio:
    """The beginning of a clip."""
    return Audio(audio.samples[: int(seconds * audio.sample_rate)], audio.sample_rate)


def read_codes(path: Path) -> AudioCodes:
    """Codes from JSON: a list of numbers 0..5119, or an object with them under "codes"."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except (ValueError, IsADirectoryError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None
    values = content.get("codes") if isinstance(content, dict) else content
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RequestError(f'{path} must hold a list of whole numbers, or an object with one under "codes"')
    if not values:
        raise RequestError(f"{path} holds no codes")
    try:
        return AudioCodes(np.asarray(values, dtype=object if max(map(abs, values)) >= 2**63 else np.int64))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


@contextmanager
def write_codes(path: Path, codes: AudioCodes) -> Iterator[None]:
    """Writes codes as JSON; the file appears only if the body succeeds."""
    content = {
        "codes": codes.interleaved.tolist(),
        "linguistic": len(codes.linguistic),
        "semantic": len(codes.semantic),
        "seconds": round(codes.seconds, 3),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        yield


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Adds the wall seconds of the body to `stages[name]`."""
    start = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - start
