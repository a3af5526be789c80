"""What a speech request holds, and what comes back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepaudio.lm.base import SamplingParams
from stepaudio.tts.checks import Problem
from stepaudio.tts.speakers import SpeakerPrompt
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes

# The release's values; a guard against endless repetition besides (formats.md section 4.5).
TTS_SAMPLING = SamplingParams(temperature=0.7, top_k=50, repetition_window=10, repetition_share=0.1, loop_guard=25)


@dataclass(frozen=True)
class TTSRequest:
    """One text to speak."""

    text: str  # style tags in front, up to 20,000 characters
    speaker: str | None = None  # a registered voice; None takes the first
    clone: Mapping[str, Any] | SpeakerPrompt | None = (
        None  # {"speaker", "prompt_text", "wav_path"} instead of a speaker
    )
    seed: int = 0
    speed: float = 1.0  # 0.5 to 2, pitch kept
    volume: float = 1.0  # 0.1 to 10
    sampling: SamplingParams = TTS_SAMPLING  # ids, stop, length and seed in it are filled in by the engine
    allow_any_tag: bool = False  # unknown style tags go to the model unchanged
    normalize: bool = False  # numbers, dates, units as words (needs wetext)


@dataclass(frozen=True)
class Piece:
    """One generated stretch of a speech: its seed makes it again, `problems` is what remained doubtful."""

    text: str
    seed: int
    codes: AudioCodes
    problems: tuple[Problem, ...]
    attempts: int


@dataclass(frozen=True, eq=False)
class Speech:
    """A finished speech: the sound and the pieces it was made of."""

    audio: Audio
    pieces: tuple[Piece, ...]

    @property
    def seconds(self) -> float:
        return self.audio.seconds

    @property
    def codes(self) -> AudioCodes:
        """The codes of all pieces in a row."""
        return functools.reduce(AudioCodes.__add__, (piece.codes for piece in self.pieces))

    @property
    def problems(self) -> list[str]:
        """What remained wrong after all attempts, piece by piece; empty if nothing did."""
        return [f"piece {i}: {p.kind}: {p.detail}" for i, piece in enumerate(self.pieces) for p in piece.problems]
