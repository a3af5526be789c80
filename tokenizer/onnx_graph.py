"""Building an ONNX file node by node: deterministic, and with the node names the caller chooses.

Knows nothing about any model. Every node has one output, called `{name}_output_0`, so that graphs
read like those the PyTorch exporter writes; constants are `Constant` nodes, weights are initializers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from tokenizer.files import atomic_write

_IR_VERSION = 7  # what files with opset 14 carry
_OPSET = 14


class GraphBuilder:
    """Collects nodes and weights. `node` and the short forms return the name of what they compute."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def node(self, op: str, name: str, inputs: Sequence[str], output: str | None = None, **attributes: object) -> str:
        """Adds one node; an empty string among the inputs leaves an optional input out."""
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type) -> str:
        """A small fixed number or array inside the graph."""
        return self.node("Constant", name, [], value=numpy_helper.from_array(np.asarray(value, dtype)))

    def weight(self, name: str, tensor: Tensor) -> str:
        """A float32 initializer."""
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def save(
        self,
        path: str | os.PathLike[str],
        name: str,
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[ValueInfoProto],
    ) -> None:
        """Checks the graph and writes it whole or not at all; same graph, same bytes."""
        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), initializer=self.weights)
        model = helper.make_model(
            graph,
            producer_name="stepaudio",
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )
        onnx.checker.check_model(model)
        with atomic_write(path) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
