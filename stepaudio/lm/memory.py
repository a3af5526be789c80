"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 0.9  # of what is free; the rest is for activations and graphs


def free_bytes(device: torch.device) -> int:
    """Bytes that may be taken on a device, a tenth of what is free kept back; no limit is known: 2^62."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return int(_SHARE * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
