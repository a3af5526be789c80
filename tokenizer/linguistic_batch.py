"""The linguistic tokenizer for whole clips on a GPU: features, encoder and codebook in few launches.

Same numbers as `FrontEnd`, `SanmEncoder` and the codebook search of `LinguisticTokenizer`, which stay the oracle; sums
are taken in another order, so a code may flip where two centroids are equally near. The dither is drawn on the CPU
from each clip's seed, kept on the device, and the same whoever shares the batch.
Legend: B clips, N samples, F frames of 10 ms, T rows of 60 ms, C chunks of 4 rows, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer.fbank import (
    CHUNK_ROWS,
    FRAME_LENGTH,
    FRAME_SHIFT,
    ROW_SIZE,
    STACK,
    STACK_SHIFT,
    Cmvn,
    frame_energies,
    row_count,
)
from tokenizer.graphs import GraphPool
from tokenizer.sanm import SanmEncoder

MAX_CHUNKS = 4096  # of one call, padding included: 300 MB at release size; longer clips take another way
_GRAPH_CHUNKS = 256  # of one graph; larger batches keep the device busy by themselves
_GRAPHS = 16
_KEPT_SEEDS, _KEPT_FRAMES = 4, 6000  # dither kept on the device: 10 MB for each seed


class Dither:
    """Standard normal [F, 400] of a seed, drawn on the CPU as `FrontEnd` draws it, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, seed: int, frames: int) -> Tensor:
        known = self._kept.get(seed)
        if known is None or len(known) < frames:
            size = max(frames, 1024)
            generator = torch.Generator().manual_seed(seed)
            known = torch.randn(size, FRAME_LENGTH, generator=generator).to(self.device)
            if size > _KEPT_FRAMES:
                return known[:frames]
            self._kept[seed] = known
            if len(self._kept) > _KEPT_SEEDS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(seed)
        return known[:frames]


class LinguisticBatch:
    """Whole clips -> codes on the encoder's device; without a CUDA device the same functions without graphs."""

    def __init__(self, cmvn: Cmvn, encoder: SanmEncoder, centroids: Tensor) -> None:
        self.encoder, self.device = encoder, encoder.after_norm.weight.device
        self.shift, self.scale = cmvn.shift.to(self.device), cmvn.scale.to(self.device)
        self.centroids = centroids.to(self.device)
        self.half_squares = self.centroids.double().square().sum(dim=1).div(2).float()
        self.dither = Dither(self.device)
        self.pool = GraphPool(self.device, _GRAPHS) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, clips: Sequence[Tensor], dither: float, seeds: Sequence[int]) -> list[np.ndarray]:
        """float32 [N] in -1..1 each -> int64 [T]; every clip at most MAX_CHUNKS chunks."""
        counts = [row_count(len(clip)) for clip in clips]
        codes = [np.zeros(0, np.int64) for _ in clips]
        for group in groups([-(-count // CHUNK_ROWS) for count in counts]):
            sounds, sizes = [clips[i] for i in group], [counts[i] for i in group]
            found = self._encode(sounds, sizes, dither, [seeds[i] for i in group])
            for i, row in zip(group, found):
                codes[i] = row[: counts[i]]
        return codes

    def _encode(self, clips: list[Tensor], counts: list[int], dither: float, seeds: list[int]) -> np.ndarray:
        rows = self.rows(clips, counts, dither, seeds)
        batch, width = len(clips), rows.shape[1]
        wide = bucket(-(-width // CHUNK_ROWS)) * CHUNK_ROWS
        full = 1 << (batch - 1).bit_length()
        graph = self.pool is not None and full * wide <= _GRAPH_CHUNKS * CHUNK_ROWS
        if graph:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, wide - width, 0, full - batch))
            counts = counts + [CHUNK_ROWS] * (full - batch)
        lengths = torch.tensor(counts).to(self.device)
        codes = self.pool.run((full, wide), self.codes, rows, lengths) if graph else self.codes(rows, lengths)
        return codes[:batch].cpu().numpy()

    def rows(self, clips: list[Tensor], counts: list[int], dither: float, seeds: list[int]) -> Tensor:
        """Normalised rows [B, T, 560] of clips of at least one row each; those past a count have no meaning."""
        samples = torch.zeros(len(clips), max(map(len, clips)))
        for row, clip in zip(samples, clips):
            row[: len(clip)] = clip
        frames = (samples.to(self.device) * 32768.0).unfold(1, FRAME_LENGTH, FRAME_SHIFT)  # [B, F, 400]
        count = frames.shape[1]
        if dither:
            known = {seed: self.dither(seed, count) for seed in set(seeds)}
            noise = known[seeds[0]] if len(known) == 1 else torch.stack([known[seed] for seed in seeds])
            frames = frames + dither * noise
        mels = frame_energies(frames)
        last = [(len(clip) - FRAME_LENGTH) // FRAME_SHIFT for clip in clips]
        last = torch.tensor(last).to(self.device)[:, None, None]
        row = torch.arange(max(counts), device=self.device)[:, None]
        at = (row * STACK_SHIFT + torch.arange(STACK, device=self.device) - STACK // 2).clamp(min=0)
        at = torch.minimum(at[None], last)  # [B, T, 7]: the first and the last frame repeat
        item = torch.arange(len(clips), device=self.device)[:, None, None]
        return (mels[item, at].reshape(len(clips), -1, ROW_SIZE) + self.shift) * self.scale

    def codes(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, 560] and row counts [B] -> nearest centroids, int64 [B, T]; no wait for the host."""
        vectors = self.encoder(rows, lengths)
        return torch.nn.functional.linear(vectors, self.centroids, -self.half_squares).argmax(dim=-1)


def bucket(chunks: int) -> int:
    """The smallest size of a graph that holds so many chunks."""
    step = 4 if chunks <= 32 else 16
    return -(-chunks // step) * step


def groups(chunks: Sequence[int]) -> list[list[int]]:
    """Indices of clips that have chunks, similar lengths together, at most MAX_CHUNKS padded ones in a group."""
    found: list[list[int]] = []
    for i in sorted((i for i in range(len(chunks)) if chunks[i]), key=lambda i: -chunks[i]):
        if found and chunks[found[-1][0]] * (len(found[-1]) + 1) <= MAX_CHUNKS:
            found[-1].append(i)
        else:
            found.append([i])
    return found
