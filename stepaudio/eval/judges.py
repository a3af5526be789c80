"""Judges that never saw our models, and measures of a voice. Knows sounds and texts only.

pocketsphinx (its own English model) and DNSMOS (package speechmos, its models inside) are optional: `missing` says
what is not installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import librosa
import numpy as np

from stepaudio.train.pitch import pitch
from stepaudio.train.synth import PROGRAMS
from stepaudio.train.text import plain
from tokenizer.audio import TOKENIZER_RATE, Audio, trim_silence

_SPELLINGS = {"color": "colour", "colors": "colours", "gray": "grey", "center": "centre", "favorite": "favourite"}
_CEPSTRA = 20


def missing(*needed: str) -> str | None:
    """Why something cannot be done here: packages by name, teacher voices as `program:voice`; None if it can."""
    for name in needed:
        program = PROGRAMS[name.split(":")[0]] if ":" in name else None
        if program and shutil.which(program) is None:
            return f"{program} is not installed"
        if program is None and importlib.util.find_spec(name) is None:
            return f"the package {name} is not installed"
    return None


def versions() -> dict[str, str | None]:
    """Of the optional judges; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in ("pocketsphinx", "speechmos"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def at_16k(audio: Audio) -> np.ndarray:
    """Samples at 16 kHz through a steep filter: what a judge hears should not hold folded frequencies."""
    if audio.sample_rate == TOKENIZER_RATE:
        return audio.samples
    return librosa.resample(
        audio.samples, orig_sr=audio.sample_rate, target_sr=TOKENIZER_RATE, res_type="soxr_hq"
    ).astype(np.float32)


@functools.cache
def _sphinx() -> Any:
    import pocketsphinx

    # Means over the whole utterance, so that neither level nor what was heard before matters.
    return pocketsphinx.Decoder(samprate=TOKENIZER_RATE, cmn="batch", loglevel="FATAL")


def sphinx(sounds: Sequence[Audio]) -> list[str]:
    """What pocketsphinx hears, in British spelling as the domain's texts are."""
    texts = []
    for sound in sounds:
        decoder = _sphinx()
        decoder.start_utt()
        decoder.process_raw((np.clip(at_16k(sound), -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        texts.append(british(decoder.hyp().hypstr if decoder.hyp() else ""))
    return texts


def british(text: str) -> str:
    """Plain words, American spellings as British ones."""
    return " ".join(_SPELLINGS.get(word, word) for word in plain(text).split())


def mos(sounds: Sequence[Audio]) -> list[dict[str, float]]:
    """DNSMOS of each sound: `overall`, `speech`, `background` (P.835) and `p808`."""
    from speechmos import dnsmos

    found = []
    for sound in sounds:
        scores = dnsmos.run(np.clip(at_16k(sound), -1, 1), TOKENIZER_RATE)
        names = {"overall": "ovrl_mos", "speech": "sig_mos", "background": "bak_mos", "p808": "p808_mos"}
        found.append({name: float(scores[key]) for name, key in names.items()})
    return found


@dataclass(frozen=True, eq=False)
class Manner:
    """How a sound is spoken: median F0 of voiced frames in Hz (0 without any), level in dB, mean cepstrum."""

    f0: float
    level: float
    cepstrum: np.ndarray


def manner(sounds: Sequence[Audio]) -> list[Manner]:
    """Measures of each sound, its silence at both ends cut off."""
    found = []
    for sound in sounds:
        samples = trim_silence(at_16k(sound))
        f0 = pitch(samples)
        level = 10 * np.log10(np.square(samples).mean() + 1e-10)
        cepstrum = librosa.feature.mfcc(y=samples, sr=TOKENIZER_RATE, n_mfcc=_CEPSTRA)[1:].mean(axis=1)
        found.append(Manner(float(np.median(f0[f0 > 0])) if (f0 > 0).any() else 0.0, float(level), cepstrum))
    return found


def nearest_share(
    voices: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    others: Sequence[Sequence[np.ndarray]],
    likeness: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[float, float, float]:
    """Share of voices that are liker to their own than to all others; mean likeness to the own and to the others."""
    near = np.array([likeness(a, b) for a, b in zip(voices, own)])
    far = np.array([[likeness(a, b) for b in row] for a, row in zip(voices, others)])
    return float((near > far.max(axis=1)).mean()), float(near.mean()), float(far.mean())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-9))


def closeness(a: np.ndarray, b: np.ndarray) -> float:
    """Less is farther: minus the Euclidean distance."""
    return -float(np.linalg.norm(a - b))
