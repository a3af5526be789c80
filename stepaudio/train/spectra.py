"""Distances of waves by their spectra, for training: the vocoder's log-mel and the multi-resolution STFT loss.

Windows and filters lie on the device, so that nothing is sent there in a step. Sources: formats.md 7.6; Yamamoto
et al., "Parallel WaveGAN", 2020. Shapes: B waves, N samples, T frames, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import MelConfig

RESOLUTIONS = (512, 1024, 2048)  # FFT sizes of the spectral loss; a quarter of each is its hop
_POWER_FLOOR, _MEL_FLOOR = 1e-9, 1e-5


def magnitude(spectrum: Tensor) -> Tensor:
    """Absolute values whose gradient is finite at zero."""
    return (spectrum.real.square() + spectrum.imag.square() + _POWER_FLOOR).sqrt()


class LogMel(nn.Module):
    """Waves [B, N] -> log-mel [B, M, T], the numbers of `cosyvoice.mel`."""

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        bank = librosa.filters.mel(
            sr=config.sampling_rate, n_fft=config.n_fft, n_mels=config.num_mels, fmin=config.fmin, fmax=config.fmax
        )
        self.register_buffer("filters", torch.from_numpy(bank).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(config.win_size), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        config = self.config
        pad = (config.n_fft - config.hop_size) // 2
        padded = F.pad(wave[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, config.n_fft, config.hop_size, config.win_size, self.window, center=False, return_complex=True
        )
        return (self.filters @ magnitude(spectrum)).clamp(min=_MEL_FLOOR).log()


class SpectralDistance(nn.Module):
    """Multi-resolution STFT loss of waves [B, N]: spectral convergence plus distance of log magnitudes."""

    def __init__(self, resolutions: Sequence[int] = RESOLUTIONS) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        for n_fft in resolutions:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, made: Tensor, wave: Tensor) -> Tensor:
        total = made.new_zeros(())
        for n_fft in self.resolutions:
            a, b = self._spectrum(made, n_fft), self._spectrum(wave, n_fft)
            convergence = ((b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-3)).mean()
            total = total + convergence + (a.log() - b.log()).abs().mean()
        return total / len(self.resolutions)

    def _spectrum(self, wave: Tensor, n_fft: int) -> Tensor:
        window = self.get_buffer(f"window{n_fft}")
        return magnitude(torch.stft(wave, n_fft, n_fft // 4, window=window, return_complex=True))
