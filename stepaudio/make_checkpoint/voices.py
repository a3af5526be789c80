"""Synthetic voices: harmonic tones with vowel-like resonances, in place of recordings.

They stand in for speakers where weights are random, and give random encoders something that changes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepaudio.checkpoints import SPEAKERS_DIR, SPEAKERS_FILE
from tokenizer.audio import Audio, write_audio
from tokenizer.files import atomic_write, make_folder

SAMPLE_RATE = 22_050
# First three resonances of vowels, Hz.
_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
_SYLLABLE_SECONDS = 0.22


@dataclass(frozen=True)
class Voice:
    """A speaker id, what its prompt says, and how its tone is made."""

    speaker: str
    text: str
    pitch: float  # Hz
    swing: float  # pitch range, as a share
    tract: float  # scale of the resonances
    seconds: float = 3.2


VOICES = (
    Voice("Tingting", "今天的天气很好，我们一起去公园走走吧。", pitch=210, swing=0.12, tract=1.1),
    Voice("TingtingRAP", "（RAP）一步一步往前走，唱着歌儿不停留。", pitch=190, swing=0.05, tract=1.05),
    Voice("Tingting哼唱", "（哼唱）晚风轻轻吹过来，星星挂在天上。", pitch=240, swing=0.3, tract=1.15),
)


def synthesize(voice: Voice, seed: int) -> Audio:
    """A few seconds of vowels in a row, each with its own pitch and loudness; 20 dB above a noise floor."""
    draws = np.random.default_rng([seed, *voice.speaker.encode()])
    time = np.arange(int(voice.seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllables = int(np.ceil(voice.seconds / _SYLLABLE_SECONDS)) + 1
    place = time / _SYLLABLE_SECONDS
    nodes = np.arange(syllables + 1)
    pitch = np.interp(place, nodes, voice.pitch * (1 + voice.swing * draws.uniform(-1, 1, syllables + 1)))
    resonances = voice.tract * np.array(_VOWELS)[draws.integers(len(_VOWELS), size=syllables + 1)]
    tracks = np.stack([np.interp(place, nodes, track) for track in resonances.T])
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    samples = np.zeros_like(time)
    for order in range(1, int(4000 / voice.pitch) + 1):
        frequency = order * pitch
        level = (1 / (1 + ((frequency - tracks) / 120) ** 2)).sum(axis=0) / order**0.5
        samples += level * np.sin(order * phase)
    loudness = np.interp(place, nodes, draws.uniform(0.5, 1, syllables + 1)) * (
        0.35 + 0.65 * np.sin(np.pi * place) ** 2
    )
    samples = samples * loudness + 0.05 * draws.standard_normal(len(time))
    return Audio((0.7 * samples / np.abs(samples).max()).astype(np.float32), SAMPLE_RATE)


def write_voices(folder: Path, seed: int) -> None:
    """`speakers_info.json` and `{id}_prompt.wav` below `folder / speakers`."""
    speakers = make_folder(folder / SPEAKERS_DIR)
    for voice in VOICES:
        write_audio(speakers / f"{voice.speaker}_prompt.wav", synthesize(voice, seed))
    with atomic_write(speakers / SPEAKERS_FILE) as temporary:
        texts = {voice.speaker: voice.text for voice in VOICES}
        temporary.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
