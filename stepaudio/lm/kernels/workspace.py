"""Scratch memory of kernels whose blocks hand partial results to the last of them.

Counters start at zero and are left at zero by every launch, so nothing is cleared between launches and a captured
graph can be replayed. Kernels that share a workspace must run one after the other (one stream).
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 16384  # blocks that can wait for each other in one launch


class Workspace:
    """Float32 numbers and int32 counters on one device; grows outside graph capture only."""

    def __init__(self, device: torch.device, floats: int = 4 * 2**20) -> None:
        self.device = device
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.floats = torch.empty(floats, dtype=torch.float32, device=device)
        self._outgrown: list[Tensor] = []  # captured graphs may still write to these

    def take(self, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """At least so many float32 numbers, of unknown value, and int32 zeros."""
        assert counters <= COUNTERS, f"{counters} blocks share results, there are {COUNTERS} counters"
        if floats > self.floats.numel():
            assert not _capturing(self.device), "a kernel's scratch grew during graph capture: run it once before"
            self._outgrown.append(self.floats)
            self.floats = torch.empty(floats, dtype=torch.float32, device=self.device)
        return self.floats, self.counters


_shared: dict[torch.device, Workspace] = {}


def shared_workspace(device: torch.device) -> Workspace:
    """The workspace of callers that bring none: one per device."""
    if device not in _shared:
        assert not _capturing(device), "the first launch of a kernel was in a graph capture: run it once before"
        _shared[device] = Workspace(device)
    return _shared[device]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
