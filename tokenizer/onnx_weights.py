"""Named weights and sizes out of `speech_tokenizer_v1.onnx`.

The file is a traced graph whose weights have mostly lost their names; each is recognised by the node
that uses it (formats.md 6.4). Knows the names, nothing of the model they belong to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from tokenizer.errors import CheckpointError
from tokenizer.files import require_file

_NAMED = re.compile(r"encoders\.(conv[12]\.(?:weight|bias)|positional_embedding)")
_USED_BY = (
    re.compile(r"/(blocks\.\d+)/(attn/(?:query|key|value|out))/(MatMul|Add)"),
    re.compile(r"/(blocks\.\d+)/mlp/(mlp\.[02])/(MatMul|Add)"),
    re.compile(r"/(blocks\.\d+)/((?:attn|mlp)_ln)/(Mul|Add_1)"),
)
_PART = {"MatMul": "weight", "Add": "bias", "Mul": "weight", "Add_1": "bias"}
_CODEBOOK = re.compile(r"/quantizer/rq/model/layers\.0/_codebook/(?:Pow_1|MatMul)")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class SemanticFile:
    """What the ONNX file says about the model; sizes not listed are those of the tensors."""

    tensors: dict[str, Tensor]  # float32, PyTorch layout: `encoder.conv1.weight`, ..., `quantizer._codebook.embed`
    num_heads: int
    strides: tuple[int, int]  # of the two convolutions


def read_semantic_onnx(path: str | os.PathLike[str]) -> SemanticFile:
    """Raises CheckpointError for a damaged file, and for a graph with other weights or without the sizes."""
    path = require_file(path, "semantic tokenizer")
    try:
        graph = onnx.load(path).graph
    except (DecodeError, OSError, ValueError):
        raise CheckpointError(f"{path} is truncated or not an ONNX file: download it again") from None
    nodes = {node.name: node for node in graph.node}
    try:
        return SemanticFile(
            tensors=_named_tensors(graph),
            num_heads=_constant(nodes["/blocks.0/attn/Constant_1"]),
            strides=(_stride(nodes["/conv1/Conv"]), _stride(nodes["/conv2/Conv"])),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not the 25 Hz semantic tokenizer of the release: {_reason(error)}") from None


def _is_weight(tensor: TensorProto) -> bool:
    """Something trained: floats, more than a single number."""
    return tensor.data_type in _FLOATS and any(size > 1 for size in tensor.dims)


def _named_tensors(graph: GraphProto) -> dict[str, Tensor]:
    weights = {tensor.name: tensor for tensor in graph.initializer if _is_weight(tensor)}
    tensors, unknown = {}, set(weights)
    for initializer, name in _names(graph, weights):
        unknown.discard(initializer)
        if name not in tensors:
            tensors[name] = _tensor(weights[initializer], name)
    if unknown:
        raise ValueError(f"{len(unknown)} weights have no known place, first {min(unknown)!r}")
    return tensors


def _names(graph: GraphProto, weights: dict[str, TensorProto]) -> Iterator[tuple[str, str]]:
    """(name in the file, name in PyTorch) of every weight that a known node uses."""
    for node in graph.node:
        for initializer in node.input:
            name = _place(node.name, initializer) if initializer in weights else None
            if name:
                yield initializer, name


def _place(node: str, initializer: str) -> str | None:
    if match := _NAMED.fullmatch(initializer):
        return f"encoder.{match[1]}"
    if _CODEBOOK.fullmatch(node):
        return "quantizer._codebook.embed"
    for pattern in _USED_BY:
        if match := pattern.fullmatch(node):
            return f"encoder.{match[1]}.{match[2].replace('/', '.')}.{_PART[match[3]]}"
    return None


def _tensor(stored: TensorProto, name: str) -> Tensor:
    """A copy in PyTorch's layout: every matrix but the position table is stored transposed."""
    tensor = torch.tensor(numpy_helper.to_array(stored)).float()
    return tensor.t().contiguous() if tensor.ndim == 2 and name != "encoder.positional_embedding" else tensor


def _constant(node: NodeProto) -> int:
    return int(numpy_helper.to_array(helper.get_node_attr_value(node, "value")))


def _stride(node: NodeProto) -> int:
    return int(helper.get_node_attr_value(node, "strides")[0])


def _reason(error: Exception) -> str:
    return f"node {error} is missing" if isinstance(error, KeyError) else str(error)
