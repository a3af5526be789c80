"""A folder -> the language model that runs it best: the fast engine where it can, else the plain one, and why.

engine     auto   fast where nothing speaks against it, else eager with one log line
           fast   fused weights, static cache, graphs (`fast.py`); RequestError where it cannot run
           eager  the transformers model, one token per call (`local.py`): baseline and oracle
precision  auto   the weights in `dtype`
           bfloat16, int8, fp8, int4: weights in so many bits, for the fast engine
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from stepaudio.lm.base import AUTO, ENGINES
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused_load import load_fused
from stepaudio.lm.geometry import read_config
from stepaudio.lm.kernels.available import reason_against
from stepaudio.lm.kernels.quantise import PRECISIONS
from stepaudio.lm.local import LocalLM
from stepaudio.lm.parallel import ParallelLM
from tokenizer.errors import RequestError

_log = logging.getLogger(__name__)


def open_lm(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    engine: str = AUTO,
    precision: str = AUTO,
    tensor_parallel: int | None = None,
    **options: Any,
) -> LocalLM | FastLM:
    """Loads a release folder; `options` are those of `LocalLM.from_dir`, and any of them asks for the eager engine.

    tensor_parallel  split every layer over so many devices (`parallel.py`)
    Raises RequestError for an engine or a precision that is unknown or cannot run here, CheckpointError for files
    that are missing or damaged.
    """
    device = torch.device(device)
    options = {name: value for name, value in options.items() if value is not None}
    engine, reason = choose(device, engine, precision, {**read_config(folder), **options})
    if reason is not None and tensor_parallel in (None, 1):
        _log.warning("language model: plain path, because %s", reason)
    if engine == "eager":
        if tensor_parallel not in (None, 1):
            why = reason or "leave out --engine eager"
            raise RequestError(f"--tensor-parallel {tensor_parallel} needs the fast engine: {why}")
        return LocalLM.from_dir(folder, device, dtype, **options)
    if precision == "bfloat16":
        dtype = torch.bfloat16
    precision = "bfloat16" if precision == AUTO else precision
    if tensor_parallel not in (None, 1):
        return ParallelLM.from_dir(folder, tensor_parallel, device, dtype, precision)
    return FastLM(load_fused(folder, device, dtype, precision))


def choose(device: torch.device, engine: str, precision: str, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The engine, "fast" or "eager", and why it is not the fast one if that was left to us.

    `config` are the keys of config.json and the options of loading. Raises RequestError as `open_lm`.
    """
    if engine not in ENGINES:
        raise RequestError(f"--engine {engine!r} is unknown: use {', '.join(ENGINES)}")
    if precision not in (AUTO, *PRECISIONS):
        raise RequestError(f"--precision {precision!r} is unknown: use {', '.join((AUTO, *PRECISIONS))}")
    if engine == "eager":
        if precision != AUTO:
            raise RequestError(f"--precision {precision} needs the fast engine: leave out --engine eager")
        return "eager", None
    reason = _reason_against_fast(device, config)
    if reason is None and precision not in (AUTO, "bfloat16") and device.type == "cuda":
        kernel = reason_against(device, precision)
        if kernel is not None:
            raise RequestError(f"--precision {precision} cannot run here: {kernel}; use --precision bfloat16")
    if reason is None:
        return "fast", None
    if engine == "fast" or precision != AUTO:
        asked = "--engine fast" if engine == "fast" else f"--precision {precision}"
        raise RequestError(f"{asked} is not possible: {reason}")
    return "eager", reason


def _reason_against_fast(device: torch.device, config: Mapping[str, Any]) -> str | None:
    """What the fast engine lacks for this, in words that follow "because"; None if nothing."""
    if config.get("device_map") is not None or config.get("max_memory") is not None:
        return "the layers are spread over devices (--device-map, or a model too large for one)"
    if config.get("quantization_config") is not None:
        return "the weights are packed by another library (quantization_config)"
    if config.get("alibi_dtype", "float32") != "float32":
        return f"alibi_dtype {config['alibi_dtype']} rounds the position bias, which the kernels do not"
    for name in ("attn_implementation", "offload_folder"):
        if config.get(name) is not None:
            return f"{name} is an option of the plain path"
    if device.type == "cuda":
        return reason_against(device)
    return None if device.type == "cpu" else f"{device.type} has neither kernels nor graphs"
