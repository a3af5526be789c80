"""The 128-band log-mel spectrogram that the semantic tokenizer listens to.

Knows nothing about models. Legend: B batch, N samples at 16 kHz, T = N // 160 frames of 10 ms.
Source: formats.md 6.2; the filters are librosa's Slaney bank, bit for bit the published asset.
"""

from __future__ import annotations

from functools import lru_cache

import librosa
import torch
from torch import Tensor

HOP_LENGTH = 160
NUM_MELS = 128
_FFT_LENGTH = 400
_EDGE = _FFT_LENGTH // 2  # samples mirrored on either side, so that frame t is centred on sample 160 t
_FLOOR = 1e-10  # power below which the logarithm stops
_RANGE = 8.0  # decades kept below the loudest band of the clip


def log_mel(samples: Tensor, lengths: Tensor | None = None) -> Tensor:
    """float32 [B, N] or [N] -> [B, 128, T] or [128, T].

    `lengths` [B] counts the real samples of each row (more than 200); what lies behind them has no
    influence and the frames there are 0. The dynamic range is that of each clip by itself.
    """
    if samples.ndim == 1:
        return log_mel(samples[None])[0]
    if lengths is None:
        lengths = torch.full((len(samples),), samples.shape[1], device=samples.device)
    assert int(lengths.min()) > _EDGE, f"a clip must be longer than {_EDGE} samples, got {int(lengths.min())}"
    return padded_log_mel(samples, lengths)


def padded_log_mel(samples: Tensor, lengths: Tensor) -> Tensor:
    """As `log_mel` of a batch, without looking at the lengths: nothing waits for the device."""
    window, filters = _window_and_filters(samples.device)
    spectrum = torch.stft(
        _mirror_edges(samples, lengths), _FFT_LENGTH, HOP_LENGTH, window=window, center=False, return_complex=True
    )
    power = torch.view_as_real(spectrum[..., :-1]).square().sum(dim=-1)  # [B, 201, T]
    log = (filters @ power).clamp(min=_FLOOR).log10()
    silent = torch.arange(log.shape[-1], device=log.device) >= (lengths // HOP_LENGTH)[:, None]
    silent = silent[:, None]
    loudest = log.masked_fill(silent, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return ((torch.maximum(log, loudest - _RANGE) + 4.0) / 4.0).masked_fill(silent, 0.0)


def _mirror_edges(samples: Tensor, lengths: Tensor) -> Tensor:
    """[B, N] -> [B, N + 400]: 200 samples mirrored before the first and behind the last of each row."""
    last = lengths[:, None] - 1
    at = torch.arange(-_EDGE, samples.shape[1] + _EDGE, device=samples.device).abs()
    return samples.gather(1, (last - (at - last).abs()).clamp(min=0))


@lru_cache(maxsize=4)
def _window_and_filters(device: torch.device) -> tuple[Tensor, Tensor]:
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=_FFT_LENGTH, n_mels=NUM_MELS))
    return torch.hann_window(_FFT_LENGTH, device=device), filters.to(device)
