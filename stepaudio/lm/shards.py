"""The weight files of a Step-1 folder: which tensor lies in which file, and whether all of them are whole.

Reads headers only, never a weight. Shard names and counts are free: the index says them, else every
`*.safetensors` of the folder is a shard (formats.md 1.3 and 13).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizer.errors import CheckpointError
from tokenizer.files import require_file

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_MAX_HEADER = 100 * 2**20  # what the safetensors format allows


def weight_map(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """File of each tensor, by name; CheckpointError if there is none or a shard of the index is missing."""
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        return _read_index(folder)
    whole = folder / WEIGHTS_NAME
    shards = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} holds no *.safetensors weights: download them or check --model-path")
    found: dict[str, Path] = {}
    for shard in shards:
        for name in read_header(shard):
            if name in found:
                raise CheckpointError(
                    f"{name} lies in {found[name].name} and in {shard.name}: remove the shards that do not belong"
                )
            found[name] = shard
    return found


def _read_index(folder: Path) -> dict[str, Path]:
    path = require_file(folder / INDEX_NAME, "weight index")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no weight index (a JSON object with weight_map): download it again") from None
    missing = sorted({file for file in names.values() if not (folder / file).is_file()})
    if missing:
        total = len(set(names.values()))
        raise CheckpointError(
            f"{folder}: {len(missing)} of {total} weight files are missing, first {missing[0]}: download them again"
        )
    return {name: folder / file for name, file in names.items()}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file; CheckpointError if it is cut off or something else."""
    path = require_file(path, "weights")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, _MAX_HEADER)))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(f"{path} is truncated or not safetensors: download it again") from None
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, its header promises {end}: download it again")
    return shapes


def read_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a weight map, from the headers of its files."""
    shapes = {path: read_header(path) for path in sorted(set(files.values()))}
    for name, path in files.items():
        if name not in shapes[path]:
            raise CheckpointError(f"{path} lacks {name}, which the index places there: download both again")
    return {name: shapes[path][name] for name, path in files.items()}


@contextmanager
def borrowed_index(source: str | os.PathLike[str] | None) -> Iterator[str | os.PathLike[str] | None]:
    """Yields `source`, or, for a local folder of shards without an index, a passing folder that holds one.

    transformers finds shards by an index only. The one written here names them by absolute path, so that
    weights left on the disk can still be read after the passing folder is gone.
    """
    folder = Path(source) if source is not None else None
    known = (
        folder is None or not folder.is_dir() or any((folder / name).exists() for name in (INDEX_NAME, WEIGHTS_NAME))
    )
    if known or not any(folder.glob("*.safetensors")):
        yield source
        return
    with tempfile.TemporaryDirectory() as name:
        files = {key: str(path.resolve()) for key, path in weight_map(source).items()}
        index = {"metadata": {}, "weight_map": files}
        (Path(name) / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        for config in Path(source).glob("*config.json"):
            shutil.copy(config, name)
        yield name


def _is_bare(folder: Path) -> bool:
    """A folder of shards that transformers would not find."""
    return any(folder.glob("*.safetensors")) and not any(
        (folder / name).exists() for name in (INDEX_NAME, WEIGHTS_NAME)
    )
