"""Whether the Triton kernels can run on a device, and if not, why: the one place that decides.

Knows nothing about the kernels. Importing this module does not import Triton.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its own interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=64)
def reason_against(device: torch.device, precision: str = "bfloat16") -> str | None:
    """Why no kernel for weights of this precision can run on a device; None where one can."""
    if os.environ.get("STEPAUDIO_KERNELS") == "0":
        return "STEPAUDIO_KERNELS=0 turns the kernels off"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels need an NVIDIA GPU, this is {device.type}"
    needed = (8, 9) if precision == "fp8" else (8, 0)
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        return (
            f"{precision} kernels need compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
        )
    return None


@lru_cache(maxsize=64)
def available(device: torch.device, precision: str = "bfloat16") -> bool:
    """Whether kernels run on a device; says why not in one log line, once per device and precision."""
    reason = reason_against(device, precision)
    if reason is not None and device.type != "cpu":
        _log.warning("plain attention and linears on %s: %s", device, reason)
    return reason is None


def takes(x: Tensor, precision: str = "bfloat16") -> bool:
    """Whether a kernel takes this activation: bfloat16 or float16 (or interpreted float32) on a device that has one."""
    if x.device.type == "cpu" and not interpreted():
        return False
    return (x.dtype in KERNEL_DTYPES or interpreted()) and available(x.device, precision)


@lru_cache(maxsize=64)
def early_launch(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends, to fetch weights: from capability 9.0 on.

    STEPAUDIO_PDL=0 turns it off.
    """
    if interpreted() or device.type != "cuda" or os.environ.get("STEPAUDIO_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *arguments: object, **options: object) -> None:
    """Runs a kernel on a device, whichever is the current one; every kernel takes the flag EARLY."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*arguments, **options, **launch_options(device))


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of every launch: the kernel's own flag, and the driver's where it is on."""
    return {"EARLY": True, "launch_pdl": True} if early_launch(device) else {"EARLY": False}
