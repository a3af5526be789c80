"""One JSON row per measurement: what, how long, on which machine, with which versions, commit and seed."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tokenizer.files import atomic_write

Row = dict[str, Any]


def machine() -> Row:
    """The machine, the versions and the commit a row was measured with."""
    import onnxruntime
    import transformers

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short commit of the clone, with `+` when files differ from it; None outside a clone."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def seconds_of(call: Callable[[], object], repeats: int, warmup: int = 1, device: str = "cpu") -> list[float]:
    """Wall seconds of each of `repeats` calls after `warmup` more; waits for a CUDA device."""
    times = []
    for index in range(warmup + repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return times


def row(name: str, times: Iterable[float], seed: int, **more: Any) -> Row:
    """A row from several timings of one thing, in seconds."""
    ordered = sorted(times)
    return {
        "name": name,
        "unit": "s",
        "median": round(statistics.median(ordered), 5),
        "min": round(ordered[0], 5),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 5),
        "repeats": len(ordered),
        "seed": seed,
        **more,
    }


def tidy(device: torch.device) -> None:
    """Gives unused memory back and begins to count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_rss_mb() -> float:
    """Largest memory this process ever held, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


def write(path: Path, command: str, rows: list[Row]) -> None:
    """A result file: the command that made it, the machine, the rows."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
