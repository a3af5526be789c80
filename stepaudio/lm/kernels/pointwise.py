"""RMS norm, add + RMS norm and SiLU x gate in one pass each, rounded where `Step1RMSNorm` and `Step1MLP` round.

Legend: W width, F inner width. Source: formats.md 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.lm.kernels.available import launch, takes

_MAX_WIDTH = 16384  # a row must fit the registers of one block
_SILU_BLOCK = 1024


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight: the mean in float32, both products in the dtype of x."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + eps).to(x.dtype) * weight


def add_rms_norm_plain(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and that sum."""
    total = residual + x
    return rms_norm_plain(total, weight, eps), total


def silu_mul_plain(gate_up: Tensor) -> Tensor:
    """[..., 2 F], gate before up -> silu(gate) * up [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., W] -> [..., W], see `rms_norm_plain`."""
    if not _row_kernel(x):
        return rms_norm_plain(x, weight, eps)
    return _launch_norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [..., W] -> the norm of their sum, and the sum."""
    if not _row_kernel(x):
        return add_rms_norm_plain(x, residual, weight, eps)
    return _launch_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2 F], gate before up -> [..., F], see `silu_mul_plain`."""
    if not takes(gate_up) or gate_up.numel() == 0:
        return silu_mul_plain(gate_up)
    from stepaudio.lm.kernels import pointwise_triton

    gate_up = gate_up.contiguous()
    inner = gate_up.shape[-1] // 2
    rows = gate_up.numel() // gate_up.shape[-1]
    out = gate_up.new_empty(*gate_up.shape[:-1], inner)
    grid = (rows, -(-inner // _SILU_BLOCK))
    launch(pointwise_triton.silu_mul, grid, gate_up.device, gate_up, out, inner, BLOCK=_SILU_BLOCK, num_warps=4)
    return out


def _row_kernel(x: Tensor) -> bool:
    return takes(x) and 0 < x.shape[-1] <= _MAX_WIDTH and x.numel() > 0


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from stepaudio.lm.kernels import pointwise_triton

    x = x.contiguous()
    width = x.shape[-1]
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = 1 << (width - 1).bit_length()
    launch(
        pointwise_triton.rms_norm,
        (x.numel() // width,),
        x.device,
        x,
        x if residual is None else residual.contiguous(),
        weight,
        normed,
        total,
        eps,
        WIDTH=width,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed, total
