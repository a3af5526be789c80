"""Weight files -> named tensors -> modules, strictly.

`read_tensors` opens `.pt` / `.safetensors` without running anything they contain;
`build` makes a module on the meta device and fills it, so that no weight is
initialised twice; every tensor must be used and every parameter filled.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.errors import CheckpointError
from tokenizer.files import require_file

_WRAPPERS = ("state_dict", "model", "module", "generator")
_PREFIXES = ("module.", "generator.")

M = TypeVar("M", bound=nn.Module)


def read_tensors(path: str | os.PathLike[str], what: str = "weights") -> dict[str, Tensor]:
    """The tensors of a `.pt` or `.safetensors` file on the CPU, by their plain names.

    Unwraps a dict under `state_dict`, `model`, `module` or `generator` and strips a common
    `module.` / `generator.` prefix (formats.md 5.1, 7.4). Raises CheckpointError for a missing,
    half-copied or foreign file, and for a pickle that would run code.
    """
    path = require_file(path, what)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{what}: {path} is truncated or not safetensors ({error}): download it again"
            ) from None
    return _plain_names(_read_pickle(path, what), path, what)


def _read_pickle(path: Path, what: str) -> object:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{what}: {path} is truncated (its zip directory is missing): download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{what}: {path} holds more than tensors and was not opened: loading it would run code from the file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{what}: {path} is damaged or no PyTorch file ({str(error).splitlines()[0]}): download it again"
        ) from None


def _plain_names(loaded: object, path: Path, what: str) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{what}: {path} holds no named tensors (found {type(loaded).__name__})")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if not tensors:
        raise CheckpointError(f"{what}: {path} holds no named tensors")
    return tensors


def build(make: Callable[[], M], tensors: Mapping[str, Tensor], source: str) -> M:
    """`make()` on the meta device, filled from `tensors` and set to eval.

    Tensors keep their dtype and device. `source` names the file in errors. Raises
    CheckpointError with the first missing, unknown or misshapen key and both shapes.
    """
    with torch.device("meta"):
        module = make()
    check_shapes({name: tuple(value.shape) for name, value in module.state_dict().items()}, tensors, source)
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    left = [name for name, value in module.named_buffers() if value.is_meta]
    assert not left, f"buffers not filled from the file must be made outside the meta device: {left}"
    return module.eval().requires_grad_(False)


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError unless `tensors` has exactly the expected keys and shapes."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {kind}, first {names[0]!r}"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{source}: keys do not match the model its config describes: {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the config asks for {shape}"
            )
