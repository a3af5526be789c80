"""Snake for training: one pass over memory forward and one backward, where plain operations take about thirty.

The oracle is `cosyvoice.hift.Snake`, which also runs wherever there is no CUDA device or no triton.
Shapes: B batch, C channels, L time.
"""

# ruff: noqa: ANN001, ANN202, N803
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosyvoice.hift import ResBlock, Snake

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain operations serve
    triton = None

_LARGEST_BLOCK = 1024

if triton is not None:

    @triton.jit
    def _forward_kernel(x_ptr, alpha_ptr, y_ptr, channels: tl.constexpr, length: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        alpha = tl.load(alpha_ptr + row % channels)
        scale = 1.0 / (alpha + 1e-9)
        for start in range(0, length, BLOCK):
            position = start + tl.arange(0, BLOCK)
            inside = position < length
            x = tl.load(x_ptr + row * length + position, mask=inside, other=0.0)
            sine = tl.sin(x * alpha)
            tl.store(y_ptr + row * length + position, x + sine * sine * scale, mask=inside)

    @triton.jit
    def _backward_kernel(
        x_ptr, alpha_ptr, up_ptr, dx_ptr, dalpha_ptr, channels: tl.constexpr, length: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        alpha = tl.load(alpha_ptr + row % channels)
        scale = 1.0 / (alpha + 1e-9)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, length, BLOCK):
            position = start + tl.arange(0, BLOCK)
            inside = position < length
            x = tl.load(x_ptr + row * length + position, mask=inside, other=0.0)
            up = tl.load(up_ptr + row * length + position, mask=inside, other=0.0)
            sine = tl.sin(x * alpha)
            twice = 2.0 * sine * tl.cos(x * alpha) * scale
            tl.store(dx_ptr + row * length + position, up * (1.0 + twice * alpha), mask=inside)
            total += up * (twice * x - sine * sine * scale * scale)
        tl.store(dalpha_ptr + row, tl.sum(total, axis=0))


class _FusedSnake(torch.autograd.Function):
    """float32 x [B, C, L] and alpha [C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, alpha)
        y = torch.empty_like(x)
        batch, channels, length = x.shape
        _forward_kernel[(batch * channels,)](x, alpha, y, channels, length, BLOCK=_block(length))
        return y

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        batch, channels, length = x.shape
        dx, dalpha = torch.empty_like(x), x.new_empty(batch, channels)
        _backward_kernel[(batch * channels,)](
            x, alpha, up.contiguous(), dx, dalpha, channels, length, BLOCK=_block(length)
        )
        return dx, dalpha.sum(dim=0)


def _block(length: int) -> int:
    return min(_LARGEST_BLOCK, triton.next_power_of_2(length))


def fused_snake(x: Tensor, alpha: Tensor) -> Tensor:
    """x + sin^2(alpha x) / alpha of float32 x [B, C, L] with alpha [C], by the kernels."""
    return _FusedSnake.apply(x, alpha)


class TrainedSnake(Snake):
    """A Snake of the same name and weight that uses the kernels for float32 on a CUDA device."""

    def forward(self, x: Tensor) -> Tensor:
        if triton is None or not x.is_cuda or x.dtype != torch.float32:
            return super().forward(x)
        return fused_snake(x, self.alpha)


def fuse_snakes(model: nn.Module) -> None:
    """Puts trained ones in the place of every Snake of the residual blocks."""
    for block in model.modules():
        if isinstance(block, ResBlock):
            for snakes in (block.activations1, block.activations2):
                for index, snake in enumerate(snakes):
                    snakes[index] = TrainedSnake(len(snake.alpha))
