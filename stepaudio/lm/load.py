"""A Step-1 folder -> a model ready to run: whole, of the right shapes, on the devices asked for.

Knows nothing about generation. Every weight file is checked by its header before a byte of weights is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.modeling import Step1ForCausalLM
from stepaudio.lm.shards import read_shapes, weight_map
from tokenizer.errors import CheckpointError


def load_model(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    **options: Any,
) -> Step1ForCausalLM:
    """The model of a release folder in eval mode, weights read straight to their place.

    `device_map` ("auto" or module -> device) and `max_memory` (device -> "70GiB") spread the layers and take the
    place of `device`. `options` go to transformers' `from_pretrained` (`alibi_dtype`, `attn_implementation`,
    `quantization_config`, `offload_folder`). Raises CheckpointError for files that are missing, cut off or of
    other shapes than config.json describes.
    """
    config = read_config(folder)
    if "quantization_config" not in config:  # packed weights have shapes of their own
        check_weights(folder, Geometry.from_config(config))
    model = Step1ForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        device_map=device_map or {"": device},
        max_memory=dict(max_memory) if max_memory else None,
        **options,
    )
    assert model.lm_head.weight is not model.model.embed_tokens.weight, "lm_head is tied to the embedding"
    return model


def check_weights(folder: str | os.PathLike[str], geometry: Geometry) -> None:
    """Raises CheckpointError unless the folder's tensors are exactly those of `geometry`."""
    found, expected = read_shapes(weight_map(folder)), geometry.weight_shapes()
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for kind, names in (("lack", missing), ("hold unknown", unknown)):
        if names:
            raise CheckpointError(
                f"{Path(folder)}: the weights {kind} {len(names)} tensors of the model in config.json, first {names[0]}"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{Path(folder)}: {name} has shape {found[name]}, config.json asks for {shape}")
