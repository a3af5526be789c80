"""The UNet that estimates the velocity of the mel flow, and the masked parts it is made of.

Knows nothing of codes or of the solver. Padding changes nothing: convolutions see zeros there, attention does not
look there, and GroupNorm takes its statistics over valid frames. Without a mask the plain operations run.
Module names are the key names of `flow.pt` under `decoder.estimator` (formats.md sections 7.2, 7.3).
Shapes: B batch, C channels, T frames, E time embedding. A mask is [B, 1, T] in the dtype of x, 1 where valid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import EstimatorConfig
from cosyvoice.layout import conv1d, mish

_TIME_SCALE = 1000  # the flow's time 0..1 is embedded as 0..1000
_NORM_GROUPS = 8


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros at padding."""
    return x if mask is None else x * mask


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm over [B, C, T] whose mean and variance leave padding out; computed in fp32 when masked."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(x)
        grouped = x.float().unflatten(1, (self.num_groups, -1))  # [B, G, C/G, T]
        weight = mask.float()[:, None]  # [B, 1, 1, T]
        count = weight.sum(dim=(2, 3), keepdim=True) * grouped.shape[2]
        centred = grouped - (grouped * weight).sum(dim=(2, 3), keepdim=True) / count
        variance = (centred.square() * weight).sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


def time_frequencies(t: Tensor, width: int) -> Tensor:
    """Times [B] in 0..1 -> sinusoids [B, width] in the dtype of t; the angles are fp32."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = (_TIME_SCALE * t)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(t.dtype)


class TimeEmbedding(nn.Module):
    """Sinusoids -> Linear, SiLU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(time_frequencies(t, self.width))))


class Block1D(nn.Module):
    """Conv, GroupNorm, Mish."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(width_in, width_out, 3, padding=1), MaskedGroupNorm(_NORM_GROUPS, width_out), nn.Mish()
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        conv, norm, _ = self.block
        return masked(mish(norm(conv1d(conv, masked(x, mask)), mask)), mask)


class ResnetBlock1D(nn.Module):
    """Two blocks with the time embedding [B, E] added between them, plus a 1x1 shortcut."""

    def __init__(self, width_in: int, width_out: int, time_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, width_out))
        self.block1 = Block1D(width_in, width_out)
        self.block2 = Block1D(width_out, width_out)
        self.res_conv = nn.Conv1d(width_in, width_out, 1)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.block1(x, mask) + self.mlp(time)[:, :, None]
        return self.block2(hidden, mask) + conv1d(self.res_conv, masked(x, mask))


class Attention(nn.Module):
    """Plain multi-head self-attention over frames."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B, T, C]; keys [B, 1, 1, T] is True for frames that may be looked at (None: all)."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class ProjectedGELU(nn.Module):
    """Linear, then the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """GELU layer of four times the width; `net.1` is the release's dropout, without weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(ProjectedGELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward over [B, T, C]."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), keys) + x
        return self.ff(self.norm3(x)) + x


class Downsample1D(nn.Module):
    """Half the frame rate: T -> ceil(T / 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv1d(self.conv, x)


class Upsample1D(nn.Module):
    """Twice the frame rate: T -> 2 T."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConditionalDecoder(nn.Module):
    """Velocity estimator: full rate, half rate and back, with skip connections."""

    def __init__(self, config: EstimatorConfig) -> None:
        super().__init__()
        full, half = config.channels
        time_width = 4 * full
        self.time_mlp = TimeEmbedding(config.in_channels, time_width)

        def stage(width_in: int, width_out: int, resample: nn.Module | None) -> nn.ModuleList:
            blocks = nn.ModuleList(
                TransformerBlock(width_out, config.num_heads, config.attention_head_dim) for _ in range(config.n_blocks)
            )
            parts = [ResnetBlock1D(width_in, width_out, time_width), blocks]
            return nn.ModuleList(parts if resample is None else [*parts, resample])

        self.down_blocks = nn.ModuleList(
            [
                stage(config.in_channels, full, Downsample1D(full)),
                stage(full, half, nn.Conv1d(half, half, 3, padding=1)),
            ]
        )
        self.mid_blocks = nn.ModuleList(stage(half, half, None) for _ in range(config.num_mid_blocks))
        self.up_blocks = nn.ModuleList(
            [
                stage(2 * half, full, Upsample1D(full)),
                stage(2 * full, full, nn.Conv1d(full, full, 3, padding=1)),
            ]
        )
        self.final_block = Block1D(full, full)
        self.final_proj = nn.Conv1d(full, config.out_channels, 1)

    def forward(self, x: Tensor, mask: Tensor | None, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        """Velocity [B, 80, T] of the noisy mel x [B, 80, T] at times t [B].

        mu and cond are [B, 80, T], spks [B, 80]; mask [B, 1, T] or None when every frame is valid.
        """
        time = self.time_mlp(t)
        half_mask = None if mask is None else mask[:, :, ::2]
        keys, half_keys = _keys(mask), _keys(half_mask)
        x = torch.cat([x, mu, spks[:, :, None].expand(-1, -1, x.shape[-1]), cond], dim=1)

        resnet, blocks, downsample = self.down_blocks[0]
        skip = _stage(resnet, blocks, x, time, mask, keys)
        x = downsample(masked(skip, mask))
        resnet, blocks, conv = self.down_blocks[1]
        half_skip = _stage(resnet, blocks, x, time, half_mask, half_keys)
        x = conv1d(conv, masked(half_skip, half_mask))
        for resnet, blocks in self.mid_blocks:
            x = _stage(resnet, blocks, x, time, half_mask, half_keys)
        resnet, blocks, upsample = self.up_blocks[0]
        x = _stage(resnet, blocks, torch.cat([x, half_skip], dim=1), time, half_mask, half_keys)
        x = upsample(masked(x, half_mask))[:, :, : skip.shape[-1]]
        resnet, blocks, conv = self.up_blocks[1]
        x = _stage(resnet, blocks, torch.cat([x, skip], dim=1), time, mask, keys)
        x = self.final_block(conv1d(conv, masked(x, mask)), mask)
        return masked(conv1d(self.final_proj, x), mask)


def _keys(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None].bool()


def _stage(
    resnet: nn.Module, blocks: nn.ModuleList, x: Tensor, time: Tensor, mask: Tensor | None, keys: Tensor | None
) -> Tensor:
    x = resnet(x, time, mask).transpose(1, 2).contiguous()
    for block in blocks:
        x = block(x, keys)
    return x.transpose(1, 2) if x.device.type == "cpu" else x.transpose(1, 2).contiguous()
