"""Writes a Step-1 folder: `config.json`, sharded safetensors and their index, in the release's naming.

Tensors are asked for one block of rows at a time and go straight to disk, so a model far larger than
the memory can be written. Knows nothing of what the numbers are. Source: formats.md sections 1.2, 1.3, 2.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from stepaudio.lm.geometry import Geometry, Shape
from stepaudio.lm.shards import INDEX_NAME
from tokenizer.files import atomic_write

SHARD_BYTES = 10_000_000_000  # the release's largest shards
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Blocks = Callable[[str, Shape], Iterable[Tensor]]


def write_lm_config(
    folder: Path,
    geometry: Geometry,
    dtype: torch.dtype = torch.bfloat16,
    bos: int = 1,
    eos: int = 3,
    pad: int = 0,
    rms_norm_eps: float = 1e-5,
) -> None:
    """`config.json` with exactly the release's keys; the ids are those of `<s>`, `<|EOT|>` and `<unk>`."""
    content = {
        "architectures": ["Step1ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_step1.Step1Config",
            "AutoModelForCausalLM": "modeling_step1.Step1ForCausalLM",
        },
        "model_type": "step1",
        "bos_token_id": bos,
        "pad_token_id": pad,
        "eos_token_id": eos,
        **asdict(geometry),
        "rms_norm_eps": rms_norm_eps,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_shards(
    folder: Path,
    shapes: Mapping[str, Shape],
    blocks: Blocks,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `model-00001.safetensors` ... and the index.

    `blocks(name, shape)` yields a tensor in pieces along its first dimension. A tensor larger than
    `shard_bytes` gets a shard to itself. `written` is told the bytes as they reach the disk.
    """
    weight_map, total = {}, 0
    for number, names in enumerate(_plan(shapes, dtype, shard_bytes), start=1):
        file = f"model-{number:05}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, blocks, dtype, written)
        weight_map |= dict.fromkeys(names, file)
        total += sum(_bytes(shapes[name], dtype) for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with atomic_write(folder / INDEX_NAME) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def whole(tensors: Mapping[str, Tensor]) -> Blocks:
    """`blocks` for tensors that are in memory."""
    return lambda name, shape: [tensors[name]]


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _plan(shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int) -> Iterator[list[str]]:
    """Names of each shard, filled in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape, dtype) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape, dtype)
    yield names


def _write_shard(
    path: Path, shapes: Mapping[str, Shape], blocks: Blocks, dtype: torch.dtype, written: Callable[[int], None]
) -> None:
    """A safetensors file: length of the header, JSON header padded to 8 bytes, the tensors' bytes in order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            rows = 0
            for block in blocks(name, shape):
                assert block.shape[1:] == shape[1:], f"{name}: a block of {tuple(block.shape)} for {shape}"
                raw = block.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
                file.write(memoryview(raw).cast("B"))
                rows += len(block)
                written(raw.nbytes)
            assert rows == shape[0], f"{name}: {rows} of {shape[0]} rows"
