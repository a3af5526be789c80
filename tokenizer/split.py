"""Linear layers that multiply large float32 batches on the tensor cores of a GPU, nearly without losing precision.

A float32 number is taken as the sum of two bfloat16 numbers, a product as three of theirs added up in float32: the
relative error of a product is about 1e-5 (TF32: 5e-4), at several times the speed of float32. Small batches, for
which it does not pay, stay in full float32. Inference only. Legend: n rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
MIN_ROWS = 1024  # from so many rows on


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> its bfloat16 rounding and the bfloat16 rounding of the rest."""
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def split_weight(weight: Tensor) -> Tensor:
    """[N, K] -> bfloat16 [N, 3 K], to be multiplied with rows as `split_linear` makes them."""
    high, low = parts(weight.detach())
    return torch.cat([high, low, high], dim=1)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, K] and `split_weight(w)` -> x w^T + bias, float32 [n, N]."""
    high, low = parts(x)
    rows = torch.cat([high, high, low], dim=1)
    if x.device.type == "cuda":
        y = torch.mm(rows, weight.T, out_dtype=torch.float32)
    else:
        y = rows.float() @ weight.float().T
    return y if bias is None else y.add_(bias)


class SplitLinear(nn.Linear):
    """A Linear whose large batches are split; the split weight is made when the first one comes."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._split: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < MIN_ROWS:
            return F.linear(x, self.weight, self.bias)
        if self._split is None:
            self._split = split_weight(self.weight)
        return split_linear(x.flatten(0, -2), self._split, self.bias).unflatten(0, x.shape[:-1])


def split(model: M) -> M:
    """Replaces every float32 Linear on a GPU with bfloat16 tensor cores, in place, and returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and _fits(child.weight):
                setattr(module, name, SplitLinear(child))
    return model


def _fits(weight: Tensor) -> bool:
    if weight.device.type != "cuda" or weight.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0) and not any(side % 8 for side in weight.shape)
