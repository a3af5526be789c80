"""Sizes of a Step-1 model and the arithmetic that follows from them: tensor shapes, parameters, bytes.

Knows config.json and nothing else: no weights, no torch. Source: formats.md sections 2 and 3.1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizer.errors import CheckpointError
from tokenizer.files import require_file

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The numbers of config.json that fix every shape. Raises CheckpointError for sizes that make no model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_attention_groups: int  # key/value heads
    num_hidden_layers: int
    max_seq_len: int  # tokens the model was trained for

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"config.json: {field.name} is {value!r}, it must be a whole number from 1 up")
        heads, groups = self.num_attention_heads, self.num_attention_groups
        if self.hidden_size % heads or heads % groups:
            raise CheckpointError(
                f"config.json: hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}, "
                f"and that a multiple of num_attention_groups {groups}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """From the keys of config.json; every one of them must be there."""
        missing = [field.name for field in fields(cls) if field.name not in config]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}: this is no Step-1 folder")
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def layer_shapes(self) -> dict[str, Shape]:
        """Tensors of one layer by their names inside it."""
        width, inner = self.hidden_size, self.intermediate_size
        shared = self.num_attention_groups * self.head_dim
        return {
            "input_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (shared, width),
            "self_attn.v_proj.weight": (shared, width),
            "self_attn.o_proj.weight": (width, width),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }

    def parts(self) -> dict[str, dict[str, Shape]]:
        """The model in running order, cut where it may be spread over devices: module -> its tensors."""
        table = (self.vocab_size, self.hidden_size)
        parts: dict[str, dict[str, Shape]] = {EMBEDDING: {"weight": table}}
        parts |= {f"model.layers.{index}": self.layer_shapes() for index in range(self.num_hidden_layers)}
        return parts | {NORM: {"weight": (self.hidden_size,)}, HEAD: {"weight": table}}

    def weight_shapes(self) -> dict[str, Shape]:
        """Every tensor of the model, by the release's key."""
        return {f"{part}.{name}": shape for part, shapes in self.parts().items() for name, shape in shapes.items()}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weight_shapes().values())

    def layer_cache_bytes(self, width: int) -> int:
        """Key/value cache of one token in one layer, for numbers of `width` bytes."""
        return 2 * self.num_attention_groups * self.head_dim * width

    def cache_bytes(self, width: int) -> int:
        """Key/value cache of one token in all layers."""
        return self.num_hidden_layers * self.layer_cache_bytes(width)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a Step-1 folder; CheckpointError if it is missing, broken or of another model."""
    path = require_file(Path(folder) / "config.json", "language model config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(config, dict) or config.get("model_type") != "step1":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f'{path}: model_type is {found!r}, "step1" is expected: check --model-path')
    return config
