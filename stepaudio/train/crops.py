"""Stretches of a corpus's features, cut by tensors of clip numbers and positions, so that nothing waits for the host.

Shapes: B stretches, T rows of a stretch, D values of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.train.features import Features


class Crops:
    """One kind of features of every clip, with the clips' bounds beside them on the device."""

    def __init__(self, features: Features) -> None:
        self.data = features.data
        ends = torch.as_tensor(features.ends, dtype=torch.long).to(self.data.device)
        self.begin = F.pad(ends[:-1], (1, 0))
        self.length = ends - self.begin

    def at(self, clips: Tensor, positions: Tensor) -> Tensor:
        """Rows at `positions` [B, T] of `clips` [B] (or [B, T]): float32 [B, T, D]; past an end stands the end."""
        clips = clips if clips.ndim == 2 else clips[:, None]
        inside = positions.clamp(min=0).minimum(self.length[clips] - 1)
        return self.data[self.begin[clips] + inside].float()

    def take(self, clips: Tensor, starts: Tensor, size: int) -> Tensor:
        """`size` rows of each clip from `starts` [B] on, [B, size, D]."""
        return self.at(clips, starts[:, None] + torch.arange(size, device=starts.device))

    def repeat(self, clips: Tensor, starts: Tensor, size: int) -> Tensor:
        """As `take`, but a clip that ends begins again."""
        positions = starts[:, None] + torch.arange(size, device=starts.device)
        return self.at(clips, positions % self.length[clips][:, None])
