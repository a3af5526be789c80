"""HiFT vocoder: log-mel -> waveform, through a harmonic source and an inverse STFT.

Knows mels and waves, nothing of codes or voices; runs in float32. Random numbers are arguments
(`SourceDraws`). Weights are plain: weight norm is multiplied out at load and can be split off again
for saving. A padded batch is exact: with `lengths`, everything past an item's end is kept at zero
before each layer that would read it, and the STFT edges are those of the item, not of the batch.
Source: formats.md 7.4, 7.5. Legend: B batch, M mel bands, T mel frames, N = hop * T samples,
H sines (fundamental and harmonics), K = n_fft / 2 + 1 bins, S = N / hop_len + 1 STFT frames, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import HiFTConfig
from cosyvoice.layout import conv1d, innermost
from cosyvoice.weight_norm import fuse_weight_norm
from tokenizer.weights import build, read_tensors

_MAGNITUDE_LIMIT = 100.0


def hop_length(config: HiFTConfig) -> int:
    """Samples per mel frame (256)."""
    return math.prod(config.upsample_rates) * config.istft_hop_len


@dataclass(frozen=True)
class SourceDraws:
    """Randomness of the harmonic source of a batch.

    `phases` [B, H]: start phases in -pi..pi (the fundamental's is ignored and taken as 0);
    `noise` [B, H, N]: standard normal, one for each sine, or [B, 1, N] where theirs are mixed already: the sum of
    independent normals with the mixer's weights is one normal of that norm.
    """

    phases: Tensor
    noise: Tensor

    @property
    def mixed(self) -> bool:
        """Whether one noise stands for those of all sines."""
        return self.noise.shape[1] == 1 < self.phases.shape[1]

    @classmethod
    def draw(cls, config: HiFTConfig, frames: int, generator: torch.Generator) -> SourceDraws:
        """One item (B = 1) of so many mel frames, mixed, drawn on the generator's device."""
        device = generator.device
        phases = (torch.rand(1, config.nb_harmonics + 1, generator=generator, device=device) * 2 - 1) * math.pi
        noise = torch.randn(1, 1, frames * hop_length(config), generator=generator, device=device)
        return cls(phases, noise)

    @classmethod
    def batch(cls, items: Sequence[SourceDraws]) -> SourceDraws:
        """Joins single items of one kind, the noise padded with zeros."""
        width = max(item.noise.shape[2] for item in items)
        noise = torch.cat([F.pad(item.noise, (0, width - item.noise.shape[2])) for item in items])
        return cls(torch.cat([item.phases for item in items]), noise)

    def to(self, device: torch.device | str) -> SourceDraws:
        return SourceDraws(self.phases.to(device), self.noise.to(device))


Trunk = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # stage, x, the source's x, lengths at that rate -> x


class Vocoded(NamedTuple):
    """What one pass of the vocoder yields."""

    wav: Tensor  # [B, N], within +- audio_limit
    f0: Tensor  # [B, T], Hz
    source: Tensor  # [B, N]


def _conv(in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    conv = nn.Conv1d(in_channels, out_channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
    nn.init.normal_(conv.weight, 0.0, 0.01)
    return conv


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, one alpha per channel; keeps zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        if torch.is_grad_enabled():
            return torch.addcmul(x, (x * alpha).sin().square(), (alpha + 1e-9).reciprocal())
        return torch.addcmul(x, (x * alpha).sin_().square_(), (alpha + 1e-9).reciprocal())  # two tensors fewer


class ResBlock(nn.Module):
    """Residual pairs of convolutions, the first of each pair dilated. [B, C, L] -> [B, C, L]."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(channels, channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_conv(channels, channels, kernel) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for conv1, conv2, snake1, snake2 in zip(self.convs1, self.convs2, self.activations1, self.activations2):
            y = conv1d(conv1, snake1(x))
            y = conv1d(conv2, snake2(_masked(y, mask)))
            x = x + _masked(y, mask)
        return x


class F0Predictor(nn.Module):
    """Mel [B, M, T] -> fundamental frequency [B, T] in Hz, not negative."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        width = config.f0_cond_channels
        layers = [(nn.Conv1d(size, width, 3, padding=1), nn.ELU()) for size in (config.in_channels, *[width] * 4)]
        self.condnet = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        x = mel
        for layer in self.condnet:
            x = _masked(layer(x), mask)
        f0 = self.classifier(x.transpose(1, 2))[..., 0].abs()
        return f0 if mask is None else f0 * mask[:, 0]


class HarmonicSource(nn.Module):
    """Sines at multiples of f0 plus noise, mixed to one channel. No gradient flows to f0."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.hop = hop_length(config)
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def forward(self, f0: Tensor, draws: SourceDraws) -> Tensor:
        """f0 [B, T] in Hz -> [B, N] in -1..1."""
        config, (weight,) = self.config, self.l_linear.weight
        f0 = f0.detach()
        voiced = (f0 > config.nsf_voiced_threshold).to(f0.dtype)[:, :, None]  # [B, T, 1]
        sines = torch.sin(self._angles(f0) + self._start_phases(draws.phases)[:, :, None])  # [B, H, T, hop]
        tone = torch.einsum("bhtk,h->btk", sines, weight) * (config.nsf_alpha * voiced)
        noise = draws.noise.unflatten(2, (-1, self.hop))
        noise = noise[:, 0] * weight.norm() if draws.mixed else torch.einsum("bhtk,h->btk", noise, weight)
        amplitude = voiced * config.nsf_sigma + (1 - voiced) * (config.nsf_alpha / 3)
        return torch.tanh(tone + amplitude * noise + self.l_linear.bias).flatten(1)

    def _angles(self, f0: Tensor) -> Tensor:
        """Phase of each sine, [B, H, T, hop]. f0 is steady within a frame, so only the steps of whole frames are
        summed, in float64: no drift, and no device differs.
        """
        orders = torch.arange(1, self.config.nb_harmonics + 2, device=f0.device, dtype=f0.dtype)
        steps = (f0[:, None] * orders[:, None] / self.config.sampling_rate).double()  # cycles per sample, [B, H, T]
        before = (steps.cumsum(dim=2) - steps) * self.hop
        within = torch.arange(1, self.hop + 1, device=f0.device, dtype=torch.float64)
        cycles = torch.addcmul(before[..., None], steps[..., None], within)
        return 2 * math.pi * (cycles.to(f0.dtype) % 1)

    @staticmethod
    def _start_phases(phases: Tensor) -> Tensor:
        return F.pad(phases[:, 1:], (1, 0))[..., None]


class SourceStft(nn.Module):
    """The short STFT and its inverse as strided convolutions with fixed bases (Hann, centred)."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        bins, time = torch.arange(n_fft // 2 + 1, device="cpu"), torch.arange(n_fft, device="cpu")
        angles = 2 * math.pi / n_fft * (bins[:, None] * time).double()
        basis = torch.cat([angles.cos(), -angles.sin()])
        window = torch.hann_window(n_fft, dtype=torch.float64, device="cpu")
        twice = torch.full((n_fft // 2 + 1,), 2.0, dtype=torch.float64, device="cpu")
        twice[[0, -1]] = 1.0  # bins without a mirror image
        synthesis = basis * twice.repeat(2)[:, None] * window / n_fft
        self._constant("analysis", basis * window)
        self._constant("synthesis", synthesis)
        self._constant("window_power", window.square()[None])

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.float()[:, None], persistent=False)

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, N] -> real ++ imaginary parts [B, 2K, S], each item mirrored at its own two ends."""
        count = wave.shape[1]
        ends = torch.full_like(wave[:, :1], count, dtype=torch.long) if lengths is None else lengths[:, None]
        index = torch.arange(-(self.n_fft // 2), count + self.n_fft // 2, device=wave.device).abs()
        index = torch.where(index < ends, index, 2 * (ends - 1) - index).clamp(min=0)
        return F.conv1d(wave.gather(1, index)[:, None], self.analysis, stride=self.hop)

    def inverse(self, spectrum: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, 2K, S] -> [B, N]; frames outside `mask` [B, 1, S] do not exist."""
        frames = torch.ones_like(spectrum[:1, :1]) if mask is None else mask
        wave = F.conv_transpose1d(_masked(spectrum, mask), self.synthesis, stride=self.hop)
        power = F.conv_transpose1d(frames, self.window_power, stride=self.hop)
        edge = self.n_fft // 2
        return (wave / power.clamp(min=1e-11))[:, 0, edge:-edge]


class HiFTVocoder(nn.Module):
    """Mel -> wave. Modules carry the release's names; `forward` is differentiable."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.hop = hop_length(config)
        rates, kernels = config.upsample_rates, config.upsample_kernel_sizes
        widths = [config.base_channels // 2**i for i in range(len(rates) + 1)]
        spectrum = config.istft_n_fft + 2
        self.m_source = HarmonicSource(config)
        self.f0_predictor = F0Predictor(config)
        self.stft = SourceStft(config.istft_n_fft, config.istft_hop_len)
        self.conv_pre = nn.Conv1d(config.in_channels, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(a, b, kernel, rate, padding=(kernel - rate) // 2)
            for a, b, rate, kernel in zip(widths, widths[1:], rates, kernels)
        )
        self.source_downs = nn.ModuleList(
            _source_down(spectrum, width, math.prod(rates[i + 1 :])) for i, width in enumerate(widths[1:])
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(*shape)
            for shape in zip(widths[1:], config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes)
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations)
            for width in widths[1:]
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
        )
        self.conv_post = _conv(widths[-1], spectrum, 7)
        for up in self.ups:
            nn.init.normal_(up.weight, 0.0, 0.01)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], config: HiFTConfig) -> HiFTVocoder:
        """Reads `hift.pt` under any of its key styles, as float32 on the CPU. Raises CheckpointError."""
        tensors = fuse_weight_norm(read_tensors(path, "vocoder"), str(path))
        return build(lambda: cls(config), {name: value.float() for name, value in tensors.items()}, str(path))

    def forward(
        self,
        mel: Tensor,
        draws: SourceDraws,
        lengths: Tensor | None = None,
        f0: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> Vocoded:
        """mel [B, M, T] -> wave [B, N], f0 and source.

        `lengths` int64 [B] are the frames of each item of a padded batch (None: all T), past which
        wave, source and predicted f0 are zero. `f0` [B, T] in Hz replaces the predicted one. `trunk`
        computes the residual blocks of a padded batch in another way.
        """
        mask = self._mask(mel, lengths, 1)
        if f0 is None:
            f0 = self.f0_predictor(_masked(mel, mask), mask)
        source = self.m_source(f0, draws)
        if lengths is not None:
            source = source * self._mask(mel, lengths, self.hop)[:, 0]
        return Vocoded(self.synthesize(mel, source, lengths, trunk), f0, source)

    def synthesize(
        self, mel: Tensor, source: Tensor, lengths: Tensor | None = None, trunk: Trunk | None = None
    ) -> Tensor:
        """mel [B, M, T] and source [B, N] -> wave [B, N]."""
        magnitude, phase = self.spectrum(mel, source, lengths, trunk)
        magnitude = magnitude.clamp(max=_MAGNITUDE_LIMIT)
        parts = torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1)
        wave = self.stft.inverse(parts, self._stft_mask(mel, lengths))
        wave = wave.clamp(-self.config.audio_limit, self.config.audio_limit)
        return wave if lengths is None else wave * self._mask(mel, lengths, self.hop)[:, 0]

    def spectrum(
        self, mel: Tensor, source: Tensor, lengths: Tensor | None = None, trunk: Trunk | None = None
    ) -> tuple[Tensor, Tensor]:
        """Magnitude (without upper limit) and phase of the wave's STFT, [B, K, S] each."""
        config, last = self.config, len(self.ups) - 1
        stft = self.stft(source, None if lengths is None else lengths * self.hop)
        stft = _masked(stft, self._stft_mask(mel, lengths))
        x, scale = self.conv_pre(_masked(mel, self._mask(mel, lengths, 1))), 1
        x = _masked(x, self._mask(mel, lengths, 1))
        for i, (up, down, source_block) in enumerate(zip(self.ups, self.source_downs, self.source_resblocks)):
            x = up(F.leaky_relu(x, config.lrelu_slope))
            scale *= config.upsample_rates[i]
            if i == last:
                x = F.pad(x, (1, 0), mode="reflect")
            mask = self._stft_mask(mel, lengths) if i == last else self._mask(mel, lengths, scale)
            if trunk is None:
                x = innermost(_masked(x, mask)) + source_block(_masked(conv1d(down, stft), mask), mask)
                x = self._mix(i, x, mask)
            else:
                x = trunk(i, x, down(stft), lengths * scale + int(i == last))
        bins = config.istft_n_fft // 2 + 1
        x = conv1d(self.conv_post, F.leaky_relu(x))
        return x[:, :bins].exp(), x[:, bins:].sin()

    def _mix(self, stage: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mean of the parallel residual blocks of one stage."""
        count = len(self.config.resblock_kernel_sizes)
        blocks = self.resblocks[stage * count : (stage + 1) * count]
        return sum(block(x, mask) for block in blocks) / count

    def _stft_mask(self, mel: Tensor, lengths: Tensor | None) -> Tensor | None:
        return self._mask(mel, lengths, math.prod(self.config.upsample_rates), extra=1)

    @staticmethod
    def _mask(mel: Tensor, lengths: Tensor | None, scale: int, extra: int = 0) -> Tensor | None:
        """1 inside, 0 past each item's end, [B, 1, T * scale + extra]; None without lengths."""
        if lengths is None:
            return None
        steps = torch.arange(mel.shape[2] * scale + extra, device=mel.device)
        return (steps < lengths[:, None] * scale + extra).to(mel.dtype)[:, None]


def _source_down(in_channels: int, out_channels: int, rate: int) -> nn.Conv1d:
    if rate == 1:
        return nn.Conv1d(in_channels, out_channels, 1)
    return nn.Conv1d(in_channels, out_channels, 2 * rate, rate, padding=rate // 2)
