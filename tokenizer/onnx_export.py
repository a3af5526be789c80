"""Writes the semantic tokenizer as `speech_tokenizer_v1.onnx`, the form in which the release ships it.

Takes named tensors and nothing else: it knows no module and no training. Node names, inputs and
output are those of the released file, so every reader of that file reads ours (formats.md 6.1, 6.4).

Legend: T mel frames, S = ceil(ceil(T/2)/2) tokens, D width, H heads, K codebook size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor

from tokenizer.onnx_graph import GraphBuilder

_CODEBOOK = "/quantizer/rq/model/layers.0/_codebook"
_MASKED = -1e10  # added to the scores of padded keys
_LAYER_NORM_EPS = 1e-5
_NORMALIZE_EPS = 1e-12


def write_semantic_onnx(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], num_heads: int) -> None:
    """Writes `feats` float32 [1, 128, T] + `feats_length` int32 [1] -> `indices` int64 [1, 1, S].

    `tensors` go by the torch names of S3Tokenizer: `encoder.conv1.weight` [D, 128, 3],
    `encoder.positional_embedding` [S max, D], `encoder.blocks.{i}.attn.query.weight` [D, D], ...,
    `quantizer._codebook.embed` [K, D]. Widths, number of blocks and K are read off the shapes;
    both convolutions have kernel 3, stride 2 and padding 1. Weights are stored as float32.
    """
    writer = _SemanticGraph(tensors, num_heads)
    writer.build()
    mels = tensors["encoder.conv1.weight"].shape[1]
    writer.graph.save(
        path,
        "semantic_tokenizer",
        inputs=[
            helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, mels, "T"]),
            helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
        ],
        outputs=[helper.make_tensor_value_info("indices", TensorProto.INT64, [1, 1, "S"])],
    )


class _SemanticGraph:
    """One method per module; activations are named by the node that makes them."""

    def __init__(self, tensors: Mapping[str, Tensor], num_heads: int) -> None:
        self.tensors = tensors
        self.num_heads = num_heads
        self.width = tensors["encoder.conv1.weight"].shape[0]
        assert self.width % num_heads == 0, f"width {self.width} does not split into {num_heads} heads"
        self.num_blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.blocks."))
        self.graph = GraphBuilder()
        self.anonymous = 0

    def build(self) -> None:
        graph = self.graph
        x, length = "feats", graph.node("Cast", "/Cast", ["feats_length"], to=TensorProto.INT64)
        for name in ("conv1", "conv2"):
            x, length = self.downsample(name, x, length)
        x = graph.node("Transpose", "/Transpose", [x], perm=[0, 2, 1])
        x = graph.node("Add", "/Add", [x, self.positions(x)])
        bias = self.attention_bias(x, length)
        for index in range(self.num_blocks):
            x = self.block(f"/blocks.{index}", f"encoder.blocks.{index}", x, bias)
        self.quantize(x)

    def downsample(self, name: str, x: str, length: str) -> tuple[str, str]:
        """Mask, convolution of stride 2, GELU; the length becomes ceil(length / 2)."""
        graph = self.graph
        mask = graph.node("Cast", f"/{name}/Cast", [self.valid(f"/{name}", x, 2, length)], to=TensorProto.FLOAT)
        x = graph.node("Mul", f"/{name}/Mask", [x, mask])
        weights = [
            graph.weight(f"encoders.{name}.{part}", self.tensors[f"encoder.{name}.{part}"])
            for part in ("weight", "bias")
        ]
        x = graph.node("Conv", f"/{name}/Conv", [x, *weights], kernel_shape=[3], pads=[1, 1], strides=[2])
        one = graph.constant(f"/{name}/One", 1, np.int64)
        two = graph.constant(f"/{name}/Two", 2, np.int64)
        length = graph.node("Div", f"/{name}/Length", [graph.node("Add", f"/{name}/Up", [length, one]), two])
        return self.gelu(f"/{name}", x), length

    def valid(self, scope: str, x: str, axis: int, length: str) -> str:
        """bool [1, n]: which of the n places along `axis` of `x` lie before `length` [1]."""
        graph = self.graph
        size = self.size(scope, x, axis)
        start, step = graph.constant(f"{scope}/Start", 0, np.int64), graph.constant(f"{scope}/Step", 1, np.int64)
        places = graph.node("Range", f"{scope}/Range", [start, graph.node("Squeeze", f"{scope}/Size", [size]), step])
        first = graph.constant(f"{scope}/First", [0], np.int64)
        places = graph.node("Unsqueeze", f"{scope}/Places", [places, first])
        return graph.node("Less", f"{scope}/Less", [places, length])

    def size(self, scope: str, x: str, axis: int) -> str:
        """int64 [1]: the length of one axis."""
        shape = self.graph.node("Shape", f"{scope}/Shape", [x])
        return self.graph.node(
            "Gather", f"{scope}/Gather", [shape, self.graph.constant(f"{scope}/Axis", [axis], np.int64)]
        )

    def positions(self, x: str) -> str:
        """The first S rows of the position table."""
        graph = self.graph
        table = graph.weight("encoders.positional_embedding", self.tensors["encoder.positional_embedding"])
        start, axis = (graph.constant(f"/positions/{name}", [0], np.int64) for name in ("Start", "SliceAxis"))
        return graph.node("Slice", "/positions/Slice", [table, start, self.size("/positions", x, 1), axis])

    def attention_bias(self, x: str, length: str) -> str:
        """float [1, 1, 1, S]: 0 for sound, -1e10 for padding."""
        graph = self.graph
        padded = graph.node("Not", "/mask/Not", [self.valid("/mask", x, 1, length)])
        padded = graph.node("Cast", "/mask/Cast", [padded], to=TensorProto.FLOAT)
        bias = graph.node("Mul", "/mask/Mul", [padded, graph.constant("/mask/Masked", _MASKED, np.float32)])
        return graph.node("Unsqueeze", "/mask/Bias", [bias, graph.constant("/mask/Axes", [1, 2], np.int64)])

    def block(self, scope: str, key: str, x: str, bias: str) -> str:
        normed = self.layer_norm(f"{scope}/attn_ln", f"{key}.attn_ln", x)
        attended = self.attention(f"{scope}/attn", f"{key}.attn", normed, bias)
        x = self.graph.node("Add", f"{scope}/Add", [x, attended])
        hidden = self.layer_norm(f"{scope}/mlp_ln", f"{key}.mlp_ln", x)
        hidden = self.linear(f"{scope}/mlp/mlp.0", f"{key}.mlp.0", hidden)
        hidden = self.gelu(f"{scope}/mlp/mlp.1", hidden)
        hidden = self.linear(f"{scope}/mlp/mlp.2", f"{key}.mlp.2", hidden)
        return self.graph.node("Add", f"{scope}/Add_1", [x, hidden])

    def layer_norm(self, scope: str, key: str, x: str) -> str:
        """Spelled out, because readers find the weight at `Mul` and the bias at `Add_1`."""
        graph = self.graph
        centred = graph.node(
            "Sub", f"{scope}/Sub", [x, graph.node("ReduceMean", f"{scope}/ReduceMean", [x], axes=[-1])]
        )
        square = graph.node("Mul", f"{scope}/Square", [centred, centred])
        variance = graph.node("ReduceMean", f"{scope}/ReduceMean_1", [square], axes=[-1])
        eps = graph.constant(f"{scope}/Constant_1", _LAYER_NORM_EPS, np.float32)
        spread = graph.node("Sqrt", f"{scope}/Sqrt", [graph.node("Add", f"{scope}/Add", [variance, eps])])
        x = graph.node("Div", f"{scope}/Div", [centred, spread])
        weight, bias = (
            graph.weight(f"encoders{key.removeprefix('encoder')}.{part}", self.tensors[f"{key}.{part}"])
            for part in ("weight", "bias")
        )
        return graph.node("Add", f"{scope}/Add_1", [graph.node("Mul", f"{scope}/Mul", [x, weight]), bias])

    def attention(self, scope: str, key: str, x: str, bias: str) -> str:
        graph = self.graph
        head_size = self.width // self.num_heads
        graph.constant(f"{scope}/Constant_1", self.num_heads, np.int64)  # where readers look the heads up
        scale = graph.constant(f"{scope}/Scale", head_size**-0.25, np.float32)
        split = graph.constant(f"{scope}/Split", [1, -1, self.num_heads, head_size], np.int64)
        heads = {}
        for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            part = graph.node(
                "Reshape", f"{scope}/{name}/Reshape", [self.linear(f"{scope}/{name}", f"{key}.{name}", x), split]
            )
            heads[name] = graph.node("Transpose", f"{scope}/{name}/Transpose", [part], perm=order)
        query = graph.node("Mul", f"{scope}/Mul", [heads["query"], scale])
        keys = graph.node("Mul", f"{scope}/Mul_1", [heads["key"], scale])
        scores = graph.node("Add", f"{scope}/Add", [graph.node("MatMul", f"{scope}/MatMul", [query, keys]), bias])
        weights = graph.node("Softmax", f"{scope}/Softmax", [scores], axis=-1)
        x = graph.node("MatMul", f"{scope}/MatMul_1", [weights, heads["value"]])
        x = graph.node("Transpose", f"{scope}/Transpose", [x], perm=[0, 2, 1, 3])
        x = graph.node(
            "Reshape", f"{scope}/Reshape", [x, graph.constant(f"{scope}/Join", [1, -1, self.width], np.int64)]
        )
        return self.linear(f"{scope}/out", f"{key}.out", x)

    def linear(self, scope: str, key: str, x: str) -> str:
        """MatMul with the transposed weight, and the bias if there is one."""
        weight = self.graph.weight(self.anonymous_name("MatMul"), self.tensors[f"{key}.weight"].t())
        x = self.graph.node("MatMul", f"{scope}/MatMul", [x, weight])
        if f"{key}.bias" not in self.tensors:
            return x
        bias = self.graph.weight(self.anonymous_name("Add"), self.tensors[f"{key}.bias"])
        return self.graph.node("Add", f"{scope}/Add", [bias, x])

    def anonymous_name(self, op: str) -> str:
        """`onnx::MatMul_3`: readers know such weights by the node that uses them, not by name."""
        self.anonymous += 1
        return f"onnx::{op}_{self.anonymous}"

    def gelu(self, scope: str, x: str) -> str:
        """x * (1 + erf(x / sqrt 2)) * 0.5"""
        graph = self.graph
        root = graph.constant(f"{scope}/Constant", np.sqrt(2.0), np.float32)
        one = graph.constant(f"{scope}/Constant_1", 1.0, np.float32)
        half = graph.constant(f"{scope}/Constant_2", 0.5, np.float32)
        error = graph.node("Erf", f"{scope}/Erf", [graph.node("Div", f"{scope}/Div", [x, root])])
        gate = graph.node("Add", f"{scope}/Add", [error, one])
        return graph.node("Mul", f"{scope}/Mul_1", [graph.node("Mul", f"{scope}/Mul", [x, gate]), half])

    def quantize(self, x: str) -> None:
        """L2-normalises each frame and takes the codeword with the largest -(|x|^2 - 2 x.e + |e|^2)."""
        graph, scope = self.graph, _CODEBOOK
        norm = graph.node("ReduceL2", "/ReduceL2", [x], axes=[-1], keepdims=1)
        norm = graph.node("Clip", "/Clip", [norm, graph.constant("/Clip/Min", _NORMALIZE_EPS, np.float32), ""])
        x = graph.node("Div", "/Div", [x, norm])
        codebook = graph.weight(self.anonymous_name("MatMul"), self.tensors["quantizer._codebook.embed"].t())
        two = graph.constant(f"{scope}/Constant", 2.0, np.float32)
        last, first = graph.constant(f"{scope}/Last", [-1], np.int64), graph.constant(f"{scope}/First", [0], np.int64)
        x_square = graph.node("ReduceSum", f"{scope}/ReduceSum", [graph.node("Pow", f"{scope}/Pow", [x, two]), last])
        product = graph.node("MatMul", f"{scope}/MatMul", [graph.node("Mul", f"{scope}/Mul", [x, two]), codebook])
        code_square = graph.node("Pow", f"{scope}/Pow_1", [codebook, two])
        code_square = graph.node("ReduceSum", f"{scope}/ReduceSum_1", [code_square, first])
        distance = graph.node("Sub", f"{scope}/Sub", [x_square, product])
        distance = graph.node("Add", f"{scope}/Add", [distance, code_square])
        nearness = graph.node("Neg", f"{scope}/Neg", [distance])
        index = graph.node("ArgMax", f"{scope}/ArgMax", [nearness], axis=-1, keepdims=0)
        graph.node("Unsqueeze", "/quantizer/rq/model/Unsqueeze", [index, first], output="indices")
