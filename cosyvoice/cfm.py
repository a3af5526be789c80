"""Conditional flow matching: from noise to mel in a few Euler steps with classifier-free guidance.

Knows the time grid, the guidance and the estimator; knows nothing of codes. Every number of the loop is made on the
host before it starts, every shape in it is fixed and nothing in it waits for the device, so that one step can be
captured as a graph. Source: formats.md section 7.3, steps 7 and 8; quirk Q21.
Shapes: B batch, T frames. A mask is [B, 1, T] in the dtype of x, 1 where valid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cosyvoice.config import FlowConfig
from cosyvoice.unet import ConditionalDecoder
from tokenizer.errors import RequestError


def time_grid(num_steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times t and widths dt of the Euler steps, [num_steps] each, on the CPU in `dtype`.

    A cosine schedule whose grid and whose sums are rounded to `dtype`, as in the release (bf16 differs from fp32).
    Raises RequestError for fewer than one step.
    """
    if num_steps < 1:
        raise RequestError(f"num_steps is {num_steps}: give 1 or more (the release uses 10)")
    grid = 1 - torch.cos(torch.linspace(0, 1, num_steps + 1, dtype=dtype) * 0.5 * math.pi)
    time, width = grid[0], grid[1] - grid[0]
    times, widths = [time], [width]
    for step in range(2, num_steps + 1):
        time = time + width
        width = grid[step] - time
        times.append(time)
        widths.append(width)
    return torch.stack(times), torch.stack(widths)


class ConditionalCFM(nn.Module):
    """The velocity estimator and the solver around it."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.guidance = config.inference_cfg_rate
        self.estimator = ConditionalDecoder(config.estimator)
        self._grids: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def grid(self, num_steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`time_grid` on the device and in the dtype of `like`, made once: the loop copies nothing from the host."""
        key = (num_steps, like.device, like.dtype)
        if key not in self._grids:
            times, widths = time_grid(num_steps, like.dtype)
            self._grids[key] = (times.to(like.device), widths.to(like.device))
        return self._grids[key]

    def forward(
        self, noise: Tensor, mask: Tensor | None, mu: Tensor, spks: Tensor, cond: Tensor, num_steps: int = 10
    ) -> Tensor:
        """Mel [B, 80, T] from noise, mu and cond [B, 80, T] and spks [B, 80], in the dtype of mu."""
        times, widths = self.grid(num_steps, mu)
        # rows 0..B-1 are conditional, rows B..2B-1 are not
        mu, spks, cond = (torch.cat([value, torch.zeros_like(value)]) for value in (mu, spks, cond))
        mask = None if mask is None else torch.cat([mask, mask])
        x = noise
        for step in range(num_steps):
            x = self.step(x, mask, mu, times[step], widths[step], spks, cond)
        return x

    def step(
        self, x: Tensor, mask: Tensor | None, mu: Tensor, t: Tensor, dt: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        """One Euler step of x [B, 80, T]; t and dt have no dimension, everything else has 2 B rows."""
        velocity = self.estimator(torch.cat([x, x]), mask, mu, t.expand(len(mu)), spks, cond)
        conditional, unconditional = velocity.chunk(2)
        return x + dt * ((1.0 + self.guidance) * conditional - self.guidance * unconditional)
