"""The SANM encoder: rows of 60 ms in, vectors of the same rate out, chunk by chunk as the release runs it.

The release feeds 4 rows at a time. Each call works on a window of 9 rows, the 5 before and the 4 new
ones; attention also sees the keys and values that the four earlier windows computed for their
first 4 rows, and the convolution sees the window alone. So the layer's output for chunk c needs the
layer below at chunk c and the first rows of chunks c-4..c-1, and all chunks of a clip, or as
many as fit in memory, go through a layer at once. Training and inference share this geometry.

Knows rows and vectors, nothing of sound or codes. Module names are the release's key names.
Legend: B clips, T rows, C chunks, W = 9 rows of a window, D width, H heads. Source: formats.md 5.2, 5.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.fbank import CHUNK_ROWS, ROW_SIZE

HISTORY = 5  # rows of the window before the chunk
LOOK_BACK = 4  # chunks whose keys and values are kept
_EPS = 1e-12


@dataclass(frozen=True)
class SanmConfig:
    """Sizes of the encoder; the defaults are the release's."""

    size: int = 512  # width of the output
    heads: int = 4
    feed_forward: int = 2048
    layers: int = 50  # all of them, the first included
    kernel: int = 11  # taps of the convolution over the values
    input_size: int = ROW_SIZE
    dropout: float = 0.1  # while training

    def __post_init__(self) -> None:
        assert self.size % self.heads == 0 and self.kernel % 2 == 1 and self.layers >= 1, self


@dataclass(frozen=True, eq=False)
class SanmState:
    """Where streams stand that began together. Never written to: the reference is a snapshot."""

    position: int  # rows encoded so far, a multiple of 4
    history: Tensor  # last rows, scaled and with their positions, [B, 5, input_size]
    past: tuple[Tensor, ...]  # per layer: keys and values of 4 chunks, [2, B, 4 chunks, 4 rows, D]

    def select(self, clips: Sequence[int]) -> SanmState:
        """The state of some of the clips."""
        index = torch.tensor(clips, dtype=torch.long, device=self.history.device)
        past = tuple(layer.index_select(1, index) for layer in self.past)
        return SanmState(self.position, self.history.index_select(0, index), past)


class SanmAttention(nn.Module):
    """Attention over window and past, plus a depthwise convolution of the values ("memory")."""

    def __init__(self, input_size: int, config: SanmConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.linear_q_k_v = nn.Linear(input_size, 3 * config.size)
        self.fsmn_block = nn.Conv1d(
            config.size, config.size, config.kernel, padding=config.kernel // 2, groups=config.size, bias=False
        )
        self.linear_out = nn.Linear(config.size, config.size)

    def forward(self, x: Tensor, past: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, W, input] -> [B, C, W, D] and the past after these chunks.

        `rows` [B, C, W] marks rows that exist, `keys` [B, C, 16 + W] those that may be attended to.
        """
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)
        value = value.masked_fill(~rows[..., None], 0.0)
        key, past_key = _with_past(key, past[0])
        all_value, past_value = _with_past(value, past[1])
        context = self._attend(query, key, all_value, keys)
        return self.linear_out(context) + self._memory(value), torch.stack([past_key, past_value])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        shape = query.shape
        query, key, value = (
            t.reshape(-1, t.shape[2], self.heads, t.shape[3] // self.heads).transpose(1, 2) for t in (query, key, value)
        )
        mask = keys.reshape(-1, 1, 1, keys.shape[-1])
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.transpose(1, 2).reshape(shape)

    def _memory(self, value: Tensor) -> Tensor:
        mixed = self.fsmn_block(value.flatten(0, 1).transpose(1, 2)).transpose(1, 2)
        return mixed.reshape(value.shape) + value


def _with_past(now: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, W, D] -> [B, C, 16 + W, D], each chunk with its 4 predecessors; and the past after the last."""
    batch, chunks, _, size = now.shape
    kept = torch.cat([past, now[:, :, :CHUNK_ROWS]], dim=1)  # [B, 4 + C, 4, D]
    before = kept.unfold(1, LOOK_BACK, 1)[:, :chunks].permute(0, 1, 4, 2, 3)
    before = before.reshape(batch, chunks, LOOK_BACK * CHUNK_ROWS, size)
    return torch.cat([before, now], dim=2), kept[:, chunks:]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, config: SanmConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.size, config.feed_forward)
        self.w_2 = nn.Linear(config.feed_forward, config.size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.w_1(x).relu_()))


class SanmLayer(nn.Module):
    """Pre-norm attention and feed-forward; no residual around the attention where the width changes."""

    def __init__(self, input_size: int, config: SanmConfig) -> None:
        super().__init__()
        self.residual = input_size == config.size
        self.norm1 = nn.LayerNorm(input_size, eps=_EPS)
        self.self_attn = SanmAttention(input_size, config)
        self.norm2 = nn.LayerNorm(config.size, eps=_EPS)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        attended, past = self.self_attn(self.norm1(x), past, rows, keys)
        attended = self.dropout(attended)
        x = x + attended if self.residual else attended
        return x + self.dropout(self.feed_forward(self.norm2(x))), past


class SanmEncoder(nn.Module):
    """Normalised rows of stacked fbank frames -> vectors that the k-means codebook quantises."""

    def __init__(self, config: SanmConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders0 = nn.ModuleList([SanmLayer(config.input_size, config)])
        self.encoders = nn.ModuleList([SanmLayer(config.size, config) for _ in range(config.layers - 1)])
        self.after_norm = nn.LayerNorm(config.size, eps=_EPS)

    def start(self, batch: int) -> SanmState:
        """State of `batch` streams before their first row."""
        weight = self.after_norm.weight
        past = weight.new_zeros(2, batch, LOOK_BACK, CHUNK_ROWS, self.config.size)
        return SanmState(0, weight.new_zeros(batch, HISTORY, self.config.input_size), (past,) * self.config.layers)

    def forward(self, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Whole clips, padded: [B, T, 560] and row counts [B] -> [B, T, D]; rows past a length hold no meaning."""
        return self.step(rows, lengths, self.start(len(rows)))[0]

    def step(self, rows: Tensor, lengths: Tensor | None, state: SanmState) -> tuple[Tensor, SanmState]:
        """The next rows of streams: [B, T, 560] -> [B, T, D] and the state after them.

        Streams that go on must get a multiple of 4 rows; a clip whose length is shorter ends here.
        """
        out, state = self.windows(rows, lengths, state)
        return out[:, :, HISTORY:].flatten(1, 2)[:, : rows.shape[1]], state

    def windows(self, rows: Tensor, lengths: Tensor | None, state: SanmState) -> tuple[Tensor, SanmState]:
        """As `step`, but every row of every window: [B, C, W, D]."""
        assert state.position % CHUNK_ROWS == 0, f"no rows may follow a short chunk ({state.position} rows so far)"
        batch, count, _ = rows.shape
        if lengths is None:
            lengths = torch.full((batch,), count, device=rows.device)
        x = rows * math.sqrt(self.config.size) + _positions(state.position, count, rows)
        x = F.pad(x, (0, 0, 0, -count % CHUNK_ROWS))
        x = torch.cat([state.history, x], dim=1)  # [B, 5 + 4 C, input]
        history = x[:, -HISTORY:].clone()
        x = x.unfold(1, HISTORY + CHUNK_ROWS, CHUNK_ROWS).transpose(2, 3)
        exists, keys = _masks(lengths, x.shape[1], state.position // CHUNK_ROWS)
        past = []
        for layer, before in zip([*self.encoders0, *self.encoders], state.past):
            x, after = layer(x, before, exists, keys)
            past.append(after)
        return self.after_norm(x), SanmState(state.position + count, history, tuple(past))


def _positions(start: int, count: int, like: Tensor) -> Tensor:
    """Sines, then cosines of the row numbers start+1 .. start+count, float32 [count, input]."""
    half = like.shape[-1] // 2
    step = math.log(10_000.0) / (half - 1)
    rates = torch.exp(torch.arange(half, device=like.device, dtype=torch.float32) * -step)
    angles = torch.arange(start + 1, start + count + 1, device=like.device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def _masks(lengths: Tensor, chunks: int, chunks_before: int) -> tuple[Tensor, Tensor]:
    """Which rows of each window exist, [B, C, W], and which keys of past and window, [B, C, 16 + W]."""
    chunk = torch.arange(chunks, device=lengths.device)
    new = chunk[:, None] * CHUNK_ROWS + torch.arange(CHUNK_ROWS, device=lengths.device)
    new = new < lengths[:, None, None]  # [B, C, 4]
    rows = F.pad(new, (HISTORY, 0), value=True)
    past = chunk[:, None] + torch.arange(LOOK_BACK, device=lengths.device) + (chunks_before - LOOK_BACK) >= 0
    past = past.repeat_interleave(CHUNK_ROWS, dim=1).expand(len(lengths), -1, -1)
    return rows, torch.cat([past, rows], dim=2)
