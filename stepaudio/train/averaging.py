"""Averages of weights over the last part of a training, which score better than the last weights.

The weight of a new value falls with the number of values before it, so that no length need be known beforehand.
Source: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", 2013 (polynomial decay).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

EVERY = 10  # steps from one update of an average to the next
_DECAY = 15.0  # the last sixteenth of the training makes up most of the average


def averaged(model: nn.Module) -> nn.Module:
    """A copy to hold the average of `model`; nothing trains it."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Call after every step (counted from 0): every tenth moves the average towards the model."""
    if (step + 1) % EVERY:
        return
    count = (step + 1) // EVERY
    weight = min(1.0, (_DECAY + 1) / (_DECAY + count))
    mine, theirs = (list(one.parameters()) for one in (average, model))
    torch._foreach_lerp_(mine, theirs, weight)
    for kept, value in zip(average.buffers(), model.buffers()):
        kept.copy_(value)
