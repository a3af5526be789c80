"""Fundamental frequency of speech on the frames of the vocoder's mel: the target of its F0 predictor.

Normalised cross-correlation of low-passed frames gives candidates, a best path over the clip chooses among
them and "unvoiced". Knows samples only. After Talkin, "A Robust Algorithm for Pitch Tracking (RAPT)", 1995.
Legend: N samples at 16 kHz, T frames (as many as the mel has), L lags, K candidates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.signal import butter, sosfiltfilt

from cosyvoice.config import MelConfig
from tokenizer.audio import TOKENIZER_RATE

LOWEST, HIGHEST = 60.0, 420.0  # Hz
_WINDOW = 512  # samples compared with their shifted copy
_SHORTEST, _LONGEST = int(TOKENIZER_RATE / HIGHEST), int(TOKENIZER_RATE / LOWEST)  # lags
_FFT = 1024  # holds window + longest lag
_CANDIDATES = 6
_UNVOICED = 0.45  # cost of an unvoiced frame; a voiced one costs 1 - correlation
_SWITCH = 0.25  # cost of a change of voicing
_JUMP = 1.5  # cost of an octave between neighbours
_LAG_COST = 0.08  # of the longest lag: the shorter of two equal periods is the period
_QUIET = 3e-4  # energy, relative to the loudest frame, that drowns correlations


def frame_count(samples: int, config: MelConfig | None = None) -> int:
    """Mel frames of a clip of so many samples at 16 kHz after resampling."""
    config = config or MelConfig()
    return -(-samples * config.sampling_rate // TOKENIZER_RATE) // config.hop_size


def pitch(samples: np.ndarray) -> np.ndarray:
    """float32 [N] at 16 kHz -> F0 in Hz at each mel frame's centre, float32 [T], 0 where unvoiced."""
    config = MelConfig()
    count = frame_count(len(samples), config)
    if count == 0 or len(samples) < 64:
        return np.zeros(count, np.float32)
    centres = (np.arange(count) + 0.5) * config.hop_size * TOKENIZER_RATE / config.sampling_rate
    scores = _correlations(sosfiltfilt(_low_pass(), samples.astype(np.float64)), np.round(centres).astype(int))
    lags, costs = _candidates(scores)
    return _best_path(lags, costs).astype(np.float32)


@lru_cache(maxsize=1)
def _low_pass() -> np.ndarray:
    return butter(4, [45, 1000], btype="bandpass", fs=TOKENIZER_RATE, output="sos")


def _correlations(samples: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Correlation of each frame with itself so many samples later, [T, L + 1], near 1 at a period."""
    reach = (_WINDOW + _LONGEST) // 2
    padded = np.pad(samples, (reach, _WINDOW + _LONGEST))
    frames = padded[centres[:, None] + np.arange(_WINDOW + _LONGEST)]
    spectrum = np.fft.rfft(frames, _FFT)
    head = np.fft.rfft(frames[:, :_WINDOW], _FFT)
    product = np.fft.irfft(spectrum * head.conj(), _FFT)[:, : _LONGEST + 1]
    total = np.pad(np.cumsum(frames**2, axis=1), ((0, 0), (1, 0)))
    energy = total[:, _WINDOW : _WINDOW + _LONGEST + 1] - total[:, : _LONGEST + 1]
    floor = _QUIET * max(1e-9, energy[:, 0].max())
    return 2 * product / (energy[:, :1] + energy + 2 * floor)


def _candidates(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best local maxima of each frame: lags with fractions and costs, [T, K]; missing ones cost 9."""
    inner = scores[:, _SHORTEST:_LONGEST]
    before, after = scores[:, _SHORTEST - 1 : _LONGEST - 1], scores[:, _SHORTEST + 1 : _LONGEST + 1]
    position = np.arange(_SHORTEST, _LONGEST)
    cost = 1 - inner * (1 - _LAG_COST * position / _LONGEST)
    cost = np.where((inner >= before) & (inner > after) & (inner > 0.2), cost, 9.0)
    best = np.argpartition(cost, _CANDIDATES, axis=1)[:, :_CANDIDATES]
    a, b, c = (np.take_along_axis(values, best, axis=1) for values in (before, inner, after))
    bend = a - 2 * b + c
    offset = np.where(bend < -1e-9, 0.5 * (a - c) / np.minimum(bend, -1e-9), 0.0)
    return position[best] + np.clip(offset, -0.5, 0.5), np.take_along_axis(cost, best, axis=1)


def _best_path(lags: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """F0 of the cheapest path through candidates and "unvoiced" (the last state), [T]."""
    count, states = len(lags), lags.shape[1] + 1
    local = np.concatenate([costs, np.full((count, 1), _UNVOICED)], axis=1)
    octave = np.log2(lags)
    come = np.zeros((count, states), int)
    total = local[0]
    change = np.full((states, states), _SWITCH)
    change[-1, -1] = 0.0
    for frame in range(1, count):
        change[:-1, :-1] = _JUMP * np.abs(octave[frame - 1][:, None] - octave[frame][None])
        arrive = total[:, None] + change
        come[frame] = arrive.argmin(axis=0)
        total = arrive.min(axis=0) + local[frame]
    f0 = np.zeros(count)
    state = int(total.argmin())
    for frame in range(count - 1, -1, -1):
        if state < states - 1:
            f0[frame] = TOKENIZER_RATE / lags[frame, state]
        state = int(come[frame, state])
    return f0
