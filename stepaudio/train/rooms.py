"""A clip as a microphone across a room hears it: echoes, a coloured background noise, another level."""

from __future__ import annotations

import numpy as np
from scipy.signal import fftconvolve

from tokenizer.audio import TOKENIZER_RATE


def in_a_room(samples: np.ndarray, seed: int) -> np.ndarray:
    """float32 [N] -> [N]. Echoes fade by 60 dB in 0.1 to 0.45 s, the noise lies 8 to 28 dB below the speech."""
    rng = np.random.default_rng(seed)
    fade = rng.uniform(0.1, 0.45)
    time = np.arange(int(fade * TOKENIZER_RATE)) / TOKENIZER_RATE
    echoes = rng.standard_normal(len(time)) * 10 ** (-3 * time / fade) * (time > 0.002)
    echoes *= rng.uniform(0.1, 0.5) / max(1e-6, float(np.sqrt(np.square(echoes).sum())))
    echoes[0] = 1.0
    heard = fftconvolve(samples, echoes)[: len(samples)]
    noise = _coloured(len(samples), rng)
    level = np.sqrt(np.square(heard).mean()) * 10 ** (-rng.uniform(8, 28) / 20)
    heard = heard + noise * level / max(1e-6, float(np.sqrt(np.square(noise).mean())))
    peak = max(1e-4, float(np.abs(heard).max()))
    return (heard * rng.uniform(0.2, 0.95) / peak).astype(np.float32)


def _coloured(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency, by 0 to 6 dB an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    return np.fft.irfft(spectrum / (1 + np.arange(len(spectrum))) ** rng.uniform(0, 1), length)
