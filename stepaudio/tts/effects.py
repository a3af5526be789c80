"""What is done to finished speech: speed, volume, pieces joined.

Knows nothing of models. Legend: N samples. The release calls sox for speed (`tempo`) and volume
(`vol`) through files; here both are numpy (formats.md section 10, Q26 and Q36).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import minimum_filter1d, uniform_filter1d

from tokenizer.audio import Audio
from tokenizer.errors import RequestError

MIN_SPEED, MAX_SPEED = 0.5, 2.0
MIN_VOLUME, MAX_VOLUME = 0.1, 10.0
PEAK = 0.99
FRAME_SECONDS, SEARCH_SECONDS = 0.04, 0.012  # two periods of a low voice; one period to slide by
LIMITER_SECONDS = 0.005
PAUSE_SECONDS, _FADE_SECONDS = 0.12, 0.01


def check_effects(speed: float, volume: float) -> None:
    """Raises RequestError for a ratio outside 0.5 to 2 (speed) or 0.1 to 10 (volume)."""
    for name, value, low, high in (("speed", speed, MIN_SPEED, MAX_SPEED), ("volume", volume, MIN_VOLUME, MAX_VOLUME)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError(f"{name} {value!r} is outside {low:g} to {high:g} (1 leaves it as it is)")


def change_speed(audio: Audio, ratio: float) -> Audio:
    """Speech `ratio` times as fast at the same pitch, round(N / ratio) samples.

    Waveform-similarity overlap-add: half-overlapping Hann frames, each taken from where it goes on
    most like the frame before it. Raises RequestError for a ratio outside 0.5 to 2.
    """
    check_effects(ratio, 1.0)
    length = round(len(audio) / ratio)
    if ratio == 1 or length == 0:
        return audio
    hop = int(FRAME_SECONDS * audio.sample_rate) // 2
    search = int(SEARCH_SECONDS * audio.sample_rate)
    window = np.hanning(2 * hop + 1)[:-1].astype(np.float32)
    padded = np.pad(audio.samples, (search + hop, search + 4 * hop + int(hop * ratio)))
    output = np.zeros(length + 3 * hop, np.float32)
    position = search  # of the frame taken last; frame 0 begins hop samples before the sound
    output[: 2 * hop] = padded[position : position + 2 * hop] * window
    for frame in range(1, length // hop + 2):
        natural = padded[position + hop : position + 3 * hop]
        nominal = min(search + int(frame * hop * ratio), len(padded) - 2 * hop - search)
        position = nominal - search + best_lag(padded[nominal - search : nominal + search + 2 * hop], natural)
        output[frame * hop : (frame + 2) * hop] += padded[position : position + 2 * hop] * window
    return Audio(output[hop : hop + length], audio.sample_rate)


def best_lag(region: np.ndarray, frame: np.ndarray) -> int:
    """Where in `region` the frame fits best, by normalised cross-correlation; the middle for silence."""
    size = len(frame)
    if len(region) < size or not frame.any():
        return max(0, (len(region) - size) // 2)
    length = 1 << (len(region) + size - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(region, length) * np.conj(np.fft.rfft(frame, length)), length)
    energy = np.cumsum(np.concatenate([[0.0], region.astype(np.float64) ** 2]))
    norm = np.sqrt(np.maximum(energy[size:] - energy[:-size], 1e-9))
    return int(np.argmax(product[: len(norm)] / norm))


def change_volume(audio: Audio, ratio: float) -> Audio:
    """Speech `ratio` times as loud; peaks that would pass 0.99 are turned down smoothly, never clipped.

    Raises RequestError for a ratio outside 0.1 to 10.
    """
    check_effects(1.0, ratio)
    samples = audio.samples * np.float32(ratio)
    if ratio == 1 or len(samples) == 0 or np.abs(samples).max() <= PEAK:
        return Audio(samples, audio.sample_rate)
    return Audio(limit(samples, int(LIMITER_SECONDS * audio.sample_rate) | 1), audio.sample_rate)


def limit(samples: np.ndarray, width: int) -> np.ndarray:
    """Turns down what would pass 0.99, smoothly; a sample's gain depends on `width - 1` samples on either side."""
    gain = np.minimum(1.0, PEAK / np.maximum(np.abs(samples), 1e-9))
    smooth = uniform_filter1d(minimum_filter1d(gain, width), width)  # at most `gain` everywhere
    return samples * smooth.astype(np.float32)


def join(pieces: Sequence[Audio]) -> Audio:
    """Pieces of one rate in a row, edges faded over 10 ms, 0.12 s of silence between them.

    A single piece stays as it is.
    """
    if len(pieces) == 1:
        return pieces[0]
    rate = pieces[0].sample_rate
    pause = np.zeros(int(PAUSE_SECONDS * rate), np.float32)
    parts: list[np.ndarray] = []
    for i, piece in enumerate(pieces):
        parts += [faded(piece, begin=i > 0, end=i < len(pieces) - 1), pause]
    return Audio(np.concatenate(parts[:-1]), rate)


def faded(piece: Audio, begin: bool, end: bool) -> np.ndarray:
    """Samples of a piece, its edges faded over 10 ms."""
    samples = piece.samples.copy()
    length = min(int(_FADE_SECONDS * piece.sample_rate), len(samples))
    ramp = np.sin(np.linspace(0, np.pi / 2, length, dtype=np.float32)) ** 2
    if begin:
        samples[:length] *= ramp
    if end:
        samples[len(samples) - length :] *= ramp[::-1]
    return samples
