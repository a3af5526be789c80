"""Vector quantisation learnt beside the encoder: nearest code forward, gradient straight through.

Codes follow a running mean of the vectors they win; a code that wins nothing for long is moved onto a
vector of the current batch. Euclidean for the linguistic codebook, cosine for the semantic one.
Shapes: N vectors, D width, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RunningCodebook(nn.Module):
    """K codes of width D as buffers, moved by `forward` while training."""

    def __init__(self, size: int, width: int, cosine: bool, decay: float = 0.99) -> None:
        super().__init__()
        self.cosine = cosine
        self.decay = decay
        self._started = False
        self.codes: Tensor
        self.register_buffer("codes", torch.zeros(size, width))
        self.register_buffer("wins", torch.ones(size))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def nearest(self, vectors: Tensor) -> Tensor:
        """[N, D] -> [N] int64."""
        if self.cosine:
            vectors = F.normalize(vectors, dim=-1)
        return (vectors @ self.codes.T - 0.5 * self.codes.square().sum(dim=1)).argmax(dim=1)

    def forward(self, vectors: Tensor, valid: Tensor, restart: bool = True) -> tuple[Tensor, Tensor]:
        """[N, D] and bool [N] -> quantised with a straight-through gradient, commitment loss.

        Vectors that are not valid are quantised too, but neither move a code nor count in the loss.
        Nothing here waits for the device, but for the first call, which finds the first codes.
        """
        vectors = vectors.float()
        target = F.normalize(vectors, dim=-1) if self.cosine else vectors
        if not self._started:
            if not self.ready:
                self.start(target.detach()[valid])
            self._started = True
        found = self.nearest(target.detach())
        quantised = self.codes[found]
        if self.training:
            self._move(target.detach(), found, valid.float(), restart)
        squares = (target - quantised).square().mean(dim=-1) * valid
        loss = squares.sum() / valid.sum() * (target.shape[-1] if self.cosine else 1.0)
        return target + (quantised - target).detach(), loss

    @property
    def used(self) -> Tensor:
        """How many codes win now and then."""
        return (self.wins > 0.02 * self.wins.mean()).sum()

    @torch.no_grad()
    def start(self, vectors: Tensor, rounds: int = 20) -> None:
        """k-means on a batch."""
        size = len(self.codes)
        order = torch.randperm(len(vectors), device=vectors.device)
        self.codes.copy_(vectors[order[torch.arange(size, device=vectors.device) % len(vectors)]])
        self.codes.add_(1e-4 * torch.randn_like(self.codes))
        for _ in range(rounds):
            found = self.nearest(vectors)
            wins = torch.zeros(size, device=vectors.device).index_add_(
                0, found, torch.ones_like(found, dtype=torch.float)
            )
            sums = torch.zeros_like(self.codes).index_add_(0, found, vectors)
            self._set(torch.where(wins[:, None] > 0, sums / wins.clamp(min=1)[:, None], self.codes))
        self.wins.fill_(1.0)
        self.sums.copy_(self.codes)
        self.ready.fill_(True)

    @torch.no_grad()
    def _move(self, vectors: Tensor, found: Tensor, weight: Tensor, restart: bool) -> None:
        wins = torch.zeros_like(self.wins).index_add_(0, found, weight)
        sums = torch.zeros_like(self.sums).index_add_(0, found, vectors * weight[:, None])
        self.wins.mul_(self.decay).add_(wins, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        self._set(self.sums / self.wins.clamp(min=1e-5)[:, None])
        if restart:
            dead = self.wins < 0.02 * self.wins.mean()
            mass = weight.cumsum(0)
            drawn = torch.rand(len(self.codes), device=mass.device) * mass[-1]
            fresh = vectors[torch.searchsorted(mass, drawn, right=True).clamp(max=len(vectors) - 1)]
            self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
            mean = self.wins.mean()
            self.wins.copy_(torch.where(dead, 0.3 * mean, self.wins))
            self.sums.copy_(torch.where(dead[:, None], fresh * 0.3 * mean, self.sums))

    def _set(self, codes: Tensor) -> None:
        self.codes.copy_(F.normalize(codes, dim=-1) if self.cosine else codes)
