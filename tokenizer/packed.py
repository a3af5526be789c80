"""Linear layers with their weights laid out once for oneDNN, which is faster on a CPU than the generic product.

Inference only, float32 only. Where this PyTorch has no oneDNN the model stays as it is.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
_ROWS = 256  # the number of rows the layout is tuned for; any number works


class PackedLinear(nn.Module):
    """A Linear [.., in] -> [.., out] whose weight is stored in oneDNN's own order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: M) -> M:
    """Replaces every float32 CPU Linear of a model, in place, and returns the model."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                isinstance(child, nn.Linear)
                and child.weight.device.type == "cpu"
                and child.weight.dtype == torch.float32
            ):
                setattr(module, name, PackedLinear(child))
    return model
