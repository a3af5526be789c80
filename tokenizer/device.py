"""Arithmetic of a CUDA device: full float32."""

from __future__ import annotations

import torch


def use_full_float32() -> None:
    """Turns TensorFloat-32 off for this process.

    Convolutions on CUDA use it by default, with 10 bits of mantissa: enough to flip audio codes and to shift the
    vocoder's pitch track. bfloat16 work is not touched (formats.md section 13.16).
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
