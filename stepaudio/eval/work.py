"""What the processes of an evaluation do with an engine: lists in, lists of the same length out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cosyvoice.hift import SourceDraws
from cosyvoice.mel import mel_spectrogram
from stepaudio.chat.engine import CHAT_SAMPLING
from stepaudio.eval.crew import engine
from stepaudio.eval.store import Take
from stepaudio.roundtrip import first_seconds
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.synth import Line
from stepaudio.train.synth import speak as synthesise
from stepaudio.tts.speech import Speech, TTSRequest
from tokenizer.audio import TOKENIZER_RATE, Audio, resample
from tokenizer.errors import RequestError, StepAudioError


def teach(lines: Sequence[Line]) -> list[Take | None]:
    """Lines in a synthesiser's voice; None for one that it refuses."""
    found: list[Take | None] = []
    for line in lines:
        try:
            found.append(Take(Audio(synthesise(line), TOKENIZER_RATE)))
        except RequestError:
            found.append(None)
    return found


def speak(requests: Sequence[TTSRequest]) -> list[Take | None]:
    """Our speech with its `problems` (kinds) and `attempts`; None for a request that ended in an error."""
    found: list[Take | None] = []
    for speech in engine().tts.synthesize_batch(requests):
        if isinstance(speech, Speech):
            problems = [problem.kind for piece in speech.pieces for problem in piece.problems]
            attempts = max(piece.attempts for piece in speech.pieces)
            found.append(Take(speech.audio, {"problems": problems, "attempts": attempts}))
        else:
            found.append(None)
    return found


def hear(sounds: Sequence[Audio]) -> list[str]:
    """Our own recognition."""
    return engine().transcribe(list(sounds))


@dataclass(frozen=True, eq=False)
class Recoding:
    """A sound to go through codes and back, with the voice prompt that is given along: a sound or a speaker id."""

    sound: Audio
    prompt: Audio | str


def recode(items: Sequence[Recoding]) -> list[Take | None]:
    """Sounds through codes and back."""
    tokenizer, tts = engine().tokenizer, engine().tts
    codes = tokenizer.encode([item.sound for item in items])
    prompts = [
        tts.voices.get(tts.speakers.find(item.prompt).wav_path)
        if isinstance(item.prompt, str)
        else tts.decoder.voice_prompt(first_seconds(item.prompt), tokenizer)
        for item in items
    ]
    return [Take(sound) for sound in tts.decoder.decode(codes, prompts)]


def vocode(sounds: Sequence[Audio]) -> list[Take | None]:
    """Sounds through their true mel and the vocoder: what the flow could reach at best."""
    decoder = engine().tts.decoder
    found: list[Take | None] = []
    for seed, sound in enumerate(sounds):
        samples = torch.from_numpy(resample(sound, decoder.sample_rate).samples)
        mel = mel_spectrogram(samples, decoder.config.mel)
        draws = SourceDraws.draw(decoder.config.hift, len(mel), torch.Generator().manual_seed(seed))
        found.append(Take(decoder.mel_to_audio([mel.T], [draws])[0]))
    return found


def embed(sounds: Sequence[Audio]) -> list[np.ndarray]:
    """Speaker embeddings by the checkpoint's own encoder."""
    encoder = engine().tts.decoder.speaker_encoder
    return [encoder.embed(sound).numpy() for sound in sounds]


@dataclass(frozen=True, eq=False)
class Question:
    """Human turns, written or spoken, that are put one after the other."""

    turns: tuple[str | Audio, ...]
    tools: bool = False
    greedy: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """The last answer, and the calls of all: name, arguments, result."""

    text: str
    calls: tuple[tuple[str, dict[str, Any], str], ...] = ()


def answer(questions: Sequence[Question]) -> list[Answered]:
    """Our answers; an error, such as a call that stays malformed, is an empty one."""
    return [_answer(question) for question in questions]


def _answer(question: Question) -> Answered:
    sampling = replace(CHAT_SAMPLING, temperature=0.0) if question.greedy else CHAT_SAMPLING
    messages: list[Any] = []
    calls: list[tuple[str, dict[str, Any], str]] = []
    text = ""
    for turn in question.turns:
        content = turn if isinstance(turn, str) else {"type": "audio", "audio": turn}
        messages.append({"role": "human", "content": content})
        try:
            reply = engine().reply(
                messages,
                text_only=True,
                tools=nano_tools() if question.tools else (),
                sampling=sampling,
                seed=question.seed,
            )
        except StepAudioError:
            return Answered("", tuple(calls))
        text, messages = reply.text, list(reply.messages)
        calls += [(call.name, dict(call.arguments), call.content) for call in reply.calls]
    return Answered(text, tuple(calls))
