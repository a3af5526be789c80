"""A module replayed as CUDA graphs while it trains: small models spend their time on launches, not on arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Replayed:
    """Calls `module(*tensors) -> Tensor`; on a CUDA device as graphs, forward and backward, one pair per shape.

    The result lies in memory that the next call of the same shape writes over. `enabled=False` calls plainly.
    """

    def __init__(self, module: nn.Module, enabled: bool = True) -> None:
        self.module = module
        self.enabled = enabled
        self._graphs: dict[tuple[object, ...], nn.Module] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not (self.enabled and self.module.training and inputs[0].is_cuda):
            return self.module(*inputs)
        key = tuple((value.shape, value.dtype) for value in inputs)
        with torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            if key not in self._graphs:
                samples = tuple(value.detach().clone() for value in inputs)
                self._graphs[key] = torch.cuda.make_graphed_callables(
                    _Shared(self.module).train(), samples, allow_unused_input=True
                )
            return self._graphs[key](*inputs)


class _Shared(nn.Module):
    """A module of its own over the same weights, because a captured module belongs to one shape."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)
