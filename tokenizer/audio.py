"""Sound in memory and on disk: `Audio`, read, write, resample, normalise, trim.

Knows nothing about codes or models. Legend: N samples, C channels.
Source of the constants: formats.md section 9.
"""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
import torchaudio

from tokenizer.errors import RequestError
from tokenizer.files import atomic_write

TOKENIZER_RATE = 16_000  # both tokenizers and the speaker encoder listen at 16 kHz
MIN_RATE, MAX_RATE = 8_000, 192_000
MAX_CHANNELS = 64
_MAX_KERNEL = 2**23  # numbers in a resampling kernel; odd rates (44,099 Hz) would need gigabytes
_STREAMED = 0x7FFF0000  # data sizes from here on are what writers put that could not go back to fill them in
_FORMATS = {  # suffix -> libsndfile format and subtype that `write_audio` writes
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
WRITTEN = tuple(_FORMATS)  # suffixes that write_audio knows
_BLOCK = 65_536  # samples encoded at a time: libsndfile overflows its stack on long ogg writes


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound. `samples` float32 [N], nominally in -1..1; `sample_rate` in Hz, 8,000 to 192,000.

    Several channels [C, N] are averaged on construction, integers are scaled to -1..1.
    Raises RequestError for other shapes and rates and for NaN or infinite samples.
    """

    samples: np.ndarray
    sample_rate: int

    def __post_init__(self) -> None:
        samples = _to_float(np.asarray(self.samples))
        if samples.ndim == 2 and len(samples) > MAX_CHANNELS:
            raise RequestError(f"audio of shape {samples.shape} has {len(samples)} channels: give [channels, samples]")
        if samples.ndim == 2 and len(samples):
            samples = samples.mean(axis=0, dtype=np.float32) if len(samples) > 1 else samples[0]
        if samples.ndim != 1:
            raise RequestError(f"audio must have the shape [samples] or [channels, samples], not {samples.shape}")
        if self.sample_rate != int(self.sample_rate) or not MIN_RATE <= self.sample_rate <= MAX_RATE:
            raise RequestError(f"sample rate {self.sample_rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
        bad = len(samples) - int(np.isfinite(samples).sum())
        if bad:
            raise RequestError(f"audio holds {bad} NaN or infinite samples: repair or export it again")
        object.__setattr__(self, "samples", np.ascontiguousarray(samples))
        object.__setattr__(self, "sample_rate", int(self.sample_rate))

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    def __len__(self) -> int:
        return len(self.samples)


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Any real samples as float32; integers are scaled by their range, unsigned ones are centred first."""
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "i":
        samples = samples / 2.0 ** (bits - 1)
    elif kind == "u":
        samples = samples / 2.0 ** (bits - 1) - 1.0
    elif kind != "f":
        raise RequestError(f"audio samples must be floats or integers, not {samples.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        return samples.astype(np.float32, copy=False)


def read_audio(path: str | os.PathLike[str]) -> Audio:
    """Reads a sound file (whatever libsndfile opens: wav, flac, ogg/opus, mp3, aiff ...) as mono.

    Raises RequestError for a missing, empty, truncated or unreadable file and for bad samples.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path} does not exist")
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give a sound file")
    if path.stat().st_size == 0:
        raise RequestError(f"{path} is empty (0 bytes)")
    _check_riff_length(path)
    try:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise RequestError(f"{path} is no sound file this can read ({reason}): convert it to wav or flac") from None
    if len(samples) == 0:
        raise RequestError(f"{path} holds 0 samples")
    try:
        return Audio(samples.T, sample_rate)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def _check_riff_length(path: Path) -> None:
    """libsndfile reads a cut-off wav without a word; compare the header with the file instead."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        while len(chunk := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                if length < _STREAMED and file.tell() + length > size:
                    raise RequestError(
                        f"{path} is truncated: its header promises {length} bytes of sound, "
                        f"{size - file.tell()} are there: copy it again"
                    )
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def write_audio(path: str | os.PathLike[str], audio: Audio) -> Path:
    """Writes mono sound by the suffix (.wav and .flac as 16 bit, .ogg, .mp3); whole or not at all.

    Samples beyond -1..1 are clipped. Raises RequestError for an unknown suffix or folder, and for a
    rate the format does not have; OSError when the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise RequestError(f"{path}: unknown sound format {path.suffix!r}: use {', '.join(_FORMATS)}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(_encode(audio, path))
    return path


def _encode(audio: Audio, path: Path) -> bytes:
    """The file's bytes, made in memory: libsndfile does not say when a disk is full."""
    name, subtype = _FORMATS[path.suffix.lower()]
    samples = np.clip(audio.samples, -1.0, 1.0)
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", audio.sample_rate, 1, subtype, format=name) as file:
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
    except soundfile.LibsndfileError as error:
        raise RequestError(
            f"{path}: cannot be written as {name} at {audio.sample_rate} Hz ({error.error_string.strip()}): use .wav"
        ) from None
    return buffer.getvalue()


def resample(audio: Audio, sample_rate: int) -> Audio:
    """Windowed-sinc resampling as the release does it (torchaudio's transform, Hann, width 6).

    Output length is ceil(N * new / old). The filter is short: what lies up to a quarter above the
    new Nyquist frequency folds back at -10 to -45 dB, as it did for the models. Rates whose exact
    polyphase kernel would not fit in memory (a ratio like 44,099 : 16,000) go through soxr instead.
    Upsampling adds no content.
    """
    if audio.sample_rate == sample_rate:
        return audio
    if len(audio) == 0:
        return Audio(audio.samples, sample_rate)
    common = math.gcd(audio.sample_rate, sample_rate)
    if (audio.sample_rate // common) * (sample_rate // common) > _MAX_KERNEL:
        samples = librosa.resample(audio.samples, orig_sr=audio.sample_rate, target_sr=sample_rate, res_type="soxr_hq")
        return Audio(samples[: math.ceil(len(audio) * sample_rate / audio.sample_rate)], sample_rate)
    with torch.inference_mode():
        samples = _resampler(audio.sample_rate, sample_rate)(torch.from_numpy(audio.samples)[None])[0].numpy()
    return Audio(samples, sample_rate)


@lru_cache(maxsize=16)
def _resampler(old: int, new: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(old, new)


def normalize_peak(samples: np.ndarray, peak: float = 0.999, floor: float = 0.01) -> np.ndarray:
    """Scales float32 [N] to the given peak; sound quieter than `floor` is raised by 1/floor at most."""
    if samples.size == 0:
        return samples
    return samples / max(float(np.abs(samples).max()), floor) * peak


def trim_silence(samples: np.ndarray) -> np.ndarray:
    """Cuts leading and trailing silence off a 16 kHz prompt, float32 [N] -> [M].

    50 ms are kept before the sound, the length is rounded up to 15 ms and 270 ms are added at
    the end, with zeros where the clip has no more sound (formats.md section 9). Digital silence
    counts as sound throughout, and no samples stay none.
    """
    if samples.size == 0:
        return samples
    _, (begin, end) = librosa.effects.trim(samples, top_db=20, frame_length=512, hop_length=128)
    unit = int(0.015 * TOKENIZER_RATE)
    length = math.ceil((end - begin) / unit) * unit + int(0.27 * TOKENIZER_RATE)
    start = int(begin) - int(0.05 * TOKENIZER_RATE)
    kept = samples[max(start, 0) :]
    if start < 0:
        kept = np.concatenate([np.zeros(-start, np.float32), kept])
    return np.pad(kept, (0, max(0, length - len(kept))))[:length]
