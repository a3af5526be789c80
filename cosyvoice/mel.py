"""Sound -> the log-mel spectrogram that the flow model predicts and the vocoder reads.

Natural log of slaney-normalised mel magnitudes; differentiable, so that a vocoder can be trained
on it. Knows nothing about volume or silence: the sound is taken as it is. Source: formats.md 7.6.
Legend: N samples, T frames = N // hop_size, M mel bands.
"""

from __future__ import annotations

from functools import lru_cache

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.config import MelConfig
from tokenizer.errors import RequestError

_POWER_FLOOR = 1e-9  # added under the square root
_MEL_FLOOR = 1e-5


def mel_spectrogram(samples: Tensor, config: MelConfig) -> Tensor:
    """Log-mel of float32 samples [..., N] at `config.sampling_rate`: float32 [..., T, M].

    Raises RequestError when the clip is shorter than one window.
    """
    pad = (config.n_fft - config.hop_size) // 2
    count = samples.shape[-1]
    if count < config.n_fft - pad:
        raise RequestError(
            f"a clip of {count} samples is too short for a mel spectrogram: "
            f"give at least {config.n_fft - pad} samples at {config.sampling_rate} Hz"
        )
    flat = F.pad(samples.reshape(-1, 1, count), (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(config.win_size, device=samples.device)
    spectrum = torch.stft(
        flat, config.n_fft, config.hop_size, config.win_size, window, center=False, return_complex=True
    )
    magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + _POWER_FLOOR)
    mel = (_filters(config).to(samples.device) @ magnitude).clamp(min=_MEL_FLOOR).log()
    return mel.transpose(1, 2).reshape(*samples.shape[:-1], -1, config.num_mels)


@lru_cache(maxsize=4)
def _filters(config: MelConfig) -> Tensor:
    """Slaney mel filter bank, float32 [M, n_fft / 2 + 1]."""
    bank = librosa.filters.mel(
        sr=config.sampling_rate, n_fft=config.n_fft, n_mels=config.num_mels, fmin=config.fmin, fmax=config.fmax
    )
    return torch.from_numpy(bank).float()
