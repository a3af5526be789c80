"""Writes a CAM++ module as `campplus.onnx`, the form in which the release ships its speaker encoder.

`input` float32 [B, T, 80] -> `output` float32 [B, E], with B and T free (formats.md 7.7).
"""

from __future__ import annotations

import os

import numpy as np
from onnx import TensorProto, helper
from torch import nn

from cosyvoice.campplus import (
    SEGMENT,
    CampPlus,
    ContextGate,
    ConvHead,
    DenseLayer,
    Projection,
    ResidualBlock,
    TimeDelay,
    Transit,
)
from tokenizer.onnx_graph import GraphBuilder

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Conv = nn.Conv1d | nn.Conv2d


def write_campplus_onnx(path: str | os.PathLike[str], model: CampPlus) -> None:
    """The module as it computes in eval mode (running statistics), whatever mode it is in."""
    writer = _CampPlusGraph()
    writer.build(model)
    config = model.config
    writer.graph.save(
        path,
        "campplus",
        inputs=[helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", config.num_mels])],
        outputs=[helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", config.embedding_size])],
    )


class _CampPlusGraph:
    """One method per module of cosyvoice.campplus; scopes are the modules' names."""

    def __init__(self) -> None:
        self.graph = GraphBuilder()

    def build(self, model: CampPlus) -> None:
        x = self.graph.node("Transpose", "/Transpose", ["input"], perm=[0, 2, 1])
        x = self.head("/head", model.head, x)
        for name, module in model.xvector.named_children():
            scope = f"/xvector/{name}"
            if isinstance(module, TimeDelay):
                x = self.norm_relu(
                    f"{scope}/nonlinear", module.nonlinear, self.conv(f"{scope}/linear", module.linear, x)
                )
            elif name.startswith("block"):
                for child, layer in module.named_children():
                    x = self.dense_layer(f"{scope}/{child}", layer, x)
            elif isinstance(module, Transit):
                x = self.conv(
                    f"{scope}/linear", module.linear, self.norm_relu(f"{scope}/nonlinear", module.nonlinear, x)
                )
            elif name == "out_nonlinear":
                x = self.norm_relu(scope, module, x)
            elif isinstance(module, Projection):
                self.project(scope, module, x)
            else:
                x = self.statistics(scope, x)

    def head(self, scope: str, head: ConvHead, x: str) -> str:
        x = self.graph.node("Unsqueeze", f"{scope}/Unsqueeze", [x, self.axes(f"{scope}/Axes", 1)])
        x = self.relu(f"{scope}/Relu", self.norm(f"{scope}/bn1", head.bn1, self.conv(f"{scope}/conv1", head.conv1, x)))
        for name in ("layer1", "layer2"):
            for child, block in getattr(head, name).named_children():
                x = self.residual(f"{scope}/{name}/{child}", block, x)
        x = self.norm(f"{scope}/bn2", head.bn2, self.conv(f"{scope}/conv2", head.conv2, x))
        shape = self.graph.constant(f"{scope}/Shape", [0, head.out_channels, -1], np.int64)
        return self.graph.node("Reshape", f"{scope}/Reshape", [self.relu(f"{scope}/Relu_1", x), shape])

    def residual(self, scope: str, block: ResidualBlock, x: str) -> str:
        y = self.norm(f"{scope}/bn1", block.bn1, self.conv(f"{scope}/conv1", block.conv1, x))
        y = self.conv(f"{scope}/conv2", block.conv2, self.relu(f"{scope}/Relu", y))
        y = self.norm(f"{scope}/bn2", block.bn2, y)
        if len(block.shortcut):
            x = self.conv(f"{scope}/shortcut/0", block.shortcut[0], x)
            x = self.norm(f"{scope}/shortcut/1", block.shortcut[1], x)
        return self.relu(f"{scope}/Relu_1", self.graph.node("Add", f"{scope}/Add", [y, x]))

    def dense_layer(self, scope: str, layer: DenseLayer, x: str) -> str:
        y = self.conv(f"{scope}/linear1", layer.linear1, self.norm_relu(f"{scope}/nonlinear1", layer.nonlinear1, x))
        y = self.gate(f"{scope}/cam_layer", layer.cam_layer, self.norm_relu(f"{scope}/nonlinear2", layer.nonlinear2, y))
        return self.graph.node("Concat", f"{scope}/Concat", [x, y], axis=1)

    def gate(self, scope: str, gate: ContextGate, x: str) -> str:
        graph = self.graph
        clip = graph.node("ReduceMean", f"{scope}/ReduceMean", [x], axes=[-1], keepdims=1)
        context = graph.node("Add", f"{scope}/Add", [clip, self.segment_means(scope, x)])
        hidden = self.relu(f"{scope}/Relu", self.conv(f"{scope}/linear1", gate.linear1, context))
        mask = graph.node("Sigmoid", f"{scope}/Sigmoid", [self.conv(f"{scope}/linear2", gate.linear2, hidden)])
        return graph.node("Mul", f"{scope}/Mul", [self.conv(f"{scope}/linear_local", gate.linear_local, x), mask])

    def segment_means(self, scope: str, x: str) -> str:
        """Frame t takes the mean number t // 100."""
        graph = self.graph
        means = graph.node(
            "AveragePool",
            f"{scope}/AveragePool",
            [x],
            kernel_shape=[SEGMENT],
            strides=[SEGMENT],
            ceil_mode=1,
            count_include_pad=0,
        )
        shape = graph.node("Shape", f"{scope}/Shape", [x])
        frames = graph.node("Gather", f"{scope}/Frames", [shape, graph.constant(f"{scope}/Last", 2, np.int64)])
        start, step = graph.constant(f"{scope}/Start", 0, np.int64), graph.constant(f"{scope}/Step", 1, np.int64)
        places = graph.node("Range", f"{scope}/Range", [start, frames, step])
        segment = graph.node("Div", f"{scope}/Div", [places, graph.constant(f"{scope}/Segment", SEGMENT, np.int64)])
        return graph.node("Gather", f"{scope}/Gather", [means, segment], axis=2)

    def statistics(self, scope: str, x: str) -> str:
        """Mean and unbiased standard deviation: sqrt(sum of squares / (T - 1))."""
        graph = self.graph
        mean = graph.node("ReduceMean", f"{scope}/ReduceMean", [x], axes=[-1], keepdims=1)
        centred = graph.node("Sub", f"{scope}/Sub", [x, mean])
        square = graph.node("Mul", f"{scope}/Square", [centred, centred])
        total = graph.node("ReduceSum", f"{scope}/ReduceSum", [square, self.axes(f"{scope}/Axes", -1)], keepdims=1)
        shape = graph.node("Shape", f"{scope}/Shape", [x])
        frames = graph.node("Gather", f"{scope}/Frames", [shape, graph.constant(f"{scope}/Last", 2, np.int64)])
        fewer = graph.node("Sub", f"{scope}/Fewer", [frames, graph.constant(f"{scope}/One", 1, np.int64)])
        count = graph.node("Cast", f"{scope}/Cast", [fewer], to=TensorProto.FLOAT)
        spread = graph.node("Sqrt", f"{scope}/Sqrt", [graph.node("Div", f"{scope}/Div", [total, count])])
        return graph.node("Concat", f"{scope}/Concat", [mean, spread], axis=1)

    def project(self, scope: str, module: Projection, x: str) -> None:
        x = self.conv(f"{scope}/linear", module.linear, x)
        x = self.graph.node("Squeeze", f"{scope}/Squeeze", [x, self.axes(f"{scope}/Axes", -1)])
        self.norm(f"{scope}/nonlinear/batchnorm", module.nonlinear.batchnorm, x, output="output")

    def conv(self, scope: str, module: Conv, x: str) -> str:
        name = scope[1:].replace("/", ".")
        weights = [self.graph.weight(f"{name}.weight", module.weight)]
        if module.bias is not None:
            weights.append(self.graph.weight(f"{name}.bias", module.bias))
        return self.graph.node(
            "Conv",
            f"{scope}/Conv",
            [x, *weights],
            kernel_shape=list(module.kernel_size),
            strides=list(module.stride),
            pads=list(module.padding) * 2,
            dilations=list(module.dilation),
        )

    def norm(self, scope: str, module: BatchNorm, x: str, output: str | None = None) -> str:
        name = scope[1:].replace("/", ".")
        mean, variance = module.running_mean, module.running_var
        scale = variance.new_ones(variance.shape) if module.weight is None else module.weight
        shift = mean.new_zeros(mean.shape) if module.bias is None else module.bias
        weights = [
            self.graph.weight(f"{name}.{key}", tensor)
            for key, tensor in (("weight", scale), ("bias", shift), ("running_mean", mean), ("running_var", variance))
        ]
        return self.graph.node(
            "BatchNormalization", f"{scope}/BatchNormalization", [x, *weights], output=output, epsilon=module.eps
        )

    def norm_relu(self, scope: str, module: nn.Sequential, x: str) -> str:
        return self.relu(f"{scope}/relu/Relu", self.norm(f"{scope}/batchnorm", module.batchnorm, x))

    def relu(self, name: str, x: str) -> str:
        return self.graph.node("Relu", name, [x])

    def axes(self, name: str, axis: int) -> str:
        return self.graph.constant(name, [axis], np.int64)
