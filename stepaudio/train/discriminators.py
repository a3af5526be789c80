"""Judges of sound for adversarial training: by period (HiFi-GAN) and by spectrogram (UnivNet), and their losses.

Knows waves only. A judge returns its verdict and the activations on the way to it. The judges are small: beside a
small vocoder the published sizes would take most of the time.
Sources: Kong et al., "HiFi-GAN", 2020; Jang et al., "UnivNet", 2021; Mao et al., "Least Squares GAN", 2017.
Shapes: B waves, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stepaudio.train.spectra import magnitude

SLOPE = 0.1
Verdict = tuple[Tensor, list[Tensor]]


class PeriodJudge(nn.Module):
    """Looks at every p-th sample: [B, N] folded to [B, 1, N / p, p], convolved along time only."""

    def __init__(self, period: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        strides = [3] * (len(widths) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (stride, 1), (2, 0)))
            for a, b, stride in zip([1, *widths], widths, strides)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> Verdict:
        wave = F.pad(wave[:, None], (0, -wave.shape[1] % self.period), mode="reflect")
        return _judge(wave.unflatten(2, (-1, self.period)), self.convs, self.last)


class SpectrogramJudge(nn.Module):
    """Looks at the magnitude spectrogram [B, 1, bins, frames] of one resolution."""

    def __init__(self, n_fft: int, width: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        shapes = [(1, (1, 1)), (width, (2, 1)), (width, (2, 1)), (width, (2, 1)), (width, (1, 1))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(size, width, (5, 3), stride, padding=(2, 1))) for size, stride in shapes
        )
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> Verdict:
        spectrum = torch.stft(wave.float(), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        return _judge(magnitude(spectrum)[:, None], self.convs, self.last)


class Judges(nn.Module):
    """All judges of one wave."""

    def __init__(
        self, periods: Sequence[int], widths: Sequence[int], resolutions: Sequence[int], spectrum_width: int
    ) -> None:
        super().__init__()
        self.judges = nn.ModuleList(
            [
                *(PeriodJudge(period, widths) for period in periods),
                *(SpectrogramJudge(n_fft, spectrum_width) for n_fft in resolutions),
            ]
        )

    def forward(self, wave: Tensor) -> list[Verdict]:
        return [judge(wave) for judge in self.judges]


def _judge(x: Tensor, convs: nn.ModuleList, last: nn.Module) -> Verdict:
    seen = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        if not seen:  # from here on channels lie together, as tensor cores want them
            x = x.contiguous(memory_format=torch.channels_last)
        seen.append(x)
    return last(x).flatten(1), seen


def judge_loss(real: list[Verdict], made: list[Verdict]) -> Tensor:
    """What the judges minimise: 1 for real sound, 0 for made sound."""
    return sum((1 - a.float()).square().mean() + b.float().square().mean() for (a, _), (b, _) in zip(real, made)) / len(
        real
    )


def maker_losses(real: list[Verdict], made: list[Verdict]) -> tuple[Tensor, Tensor]:
    """What the vocoder minimises: verdicts on its sound other than 1, and activations other than real ones."""
    fooled = sum((1 - b.float()).square().mean() for b, _ in made) / len(made)
    distances = [
        (x.detach() - y).abs().mean(dtype=torch.float32) / x.detach().abs().mean(dtype=torch.float32).clamp(min=1e-3)
        for (_, xs), (_, ys) in zip(real, made)
        for x, y in zip(xs, ys)
    ]
    return fooled, torch.stack(distances).mean()
