"""Conformer encoder over token embeddings, with relative positions and full bidirectional attention.

Knows nothing of codes, prompts or mel. Module names are the key names of `flow.pt` (formats.md sections 7.2, 7.3).
Shapes: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import EncoderConfig


def relative_positions(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoids for the offsets length-1 ... -(length-1): [2 length - 1, width], sine on even columns.

    Computed in fp32 and then cast, as the release does with its table.
    """
    offsets = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)
    columns = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = offsets[:, None] * torch.exp(columns * -(math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """[B, H, N, 2N-1] scores by offset -> [B, H, N, N] scores by key: entry (i, j) takes offset i - j."""
    batch, heads, rows, offsets = scores.shape
    shifted = F.pad(scores, (1, 0)).reshape(batch, heads, offsets + 1, rows)
    return shifted[:, :, 1:].reshape(batch, heads, rows, offsets)[..., :rows]


class RelativeAttention(nn.Module):
    """Multi-head attention with the content and position biases of Transformer-XL."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], positions [2N-1, D], mask [B, N] True where valid (None: everywhere)."""
        query = self.linear_q(x).unflatten(-1, (self.heads, -1))
        key = self.linear_k(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.linear_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        position = self.linear_pos(positions).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        by_content = (query + self.pos_bias_u).transpose(1, 2) @ key.transpose(-2, -1)
        by_position = (query + self.pos_bias_v).transpose(1, 2) @ position.transpose(-2, -1)
        scores = (by_content + relative_shift(by_position)) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return self.linear_out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class ConformerLayer(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config.output_size, config.attention_heads)
        self.feed_forward = FeedForward(config.output_size, config.linear_units)
        self.norm_ff = nn.LayerNorm(config.output_size)
        self.norm_mha = nn.LayerNorm(config.output_size)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask)
        return x + self.feed_forward(self.norm_ff(x))


class InputLayer(nn.Module):
    """Linear and LayerNorm under the release's name `embed.out`."""

    def __init__(self, input_size: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(input_size, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class ConformerEncoder(nn.Module):
    """Embeddings [B, N, input_size] -> states [B, N, output_size]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.width = config.output_size
        self.embed = InputLayer(config.input_size, config.output_size)
        self.encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask [B, N] is True where valid (None: everywhere); what stands at padding is not meaningful."""
        x = self.embed(x) * math.sqrt(self.width)
        positions = relative_positions(x.shape[1], self.width, x.device, x.dtype)
        for layer in self.encoders:
            x = layer(x, positions, mask)
        return self.after_norm(x)
