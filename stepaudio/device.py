"""Device, dtype and arithmetic, chosen once by an entry point; nothing below asks again."""

from __future__ import annotations

import logging
import os

import torch

from stepaudio.lm.geometry import Geometry, read_config
from tokenizer.device import use_full_float32
from tokenizer.errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_SHARE = 0.8  # of a device's memory that a language model's weights may take
_log = logging.getLogger(__name__)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` takes the first CUDA device, else the CPU and says so. Raises RequestError for one that is not there.

    Every entry point comes through here, so this is also where float32 work on CUDA becomes full float32.
    """
    use_full_float32()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        _log.warning("no CUDA device found: running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"--device {name!r} is unknown: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"--device {name!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("--device mps is not available on this machine")
    return device


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, as in the release, and float32 elsewhere."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise RequestError(f"--dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def device_map_for(folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> str | None:
    """`auto`, which spreads over all CUDA devices, for a language model too large for `device`; else None.

    Raises CheckpointError if its config.json cannot be read.
    """
    if device.type != "cuda":
        return None
    weights = Geometry.from_config(read_config(folder)).parameters * dtype.itemsize
    return "auto" if weights > _MAX_SHARE * torch.cuda.get_device_properties(device).total_memory else None
