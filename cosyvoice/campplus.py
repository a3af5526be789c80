"""CAM++, the speaker encoder that the release ships as `campplus.onnx`, as a trainable module.

A 2-D convolutional head, a time-delay layer, three densely connected blocks whose layers gate
themselves by context (mean over the clip plus mean over 100-frame segments), and statistics pooling.
Knows nothing about sound: it takes fbanks. Key names are those of 3D-Speaker's public checkpoints.

Legend: B batch, T fbank frames, C channels, E embedding. Source: Wang et al., "CAM++: A Fast and
Efficient Network for Speaker Verification Using Context-Aware Masking", 2023; formats.md 7.7.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEGMENT = 100  # frames (at half rate) that share one local context


@dataclass(frozen=True)
class CampPlusConfig:
    """Sizes; the defaults are the release's (28.3 MB)."""

    num_mels: int = 80  # a multiple of 8
    embedding_size: int = 192
    growth_rate: int = 32  # channels every dense layer adds
    bottleneck: int = 4  # bottleneck channels = bottleneck * growth_rate
    init_channels: int = 128  # after the time-delay layer
    head_channels: int = 32
    block_layers: tuple[int, ...] = (12, 24, 16)
    block_dilations: tuple[int, ...] = (1, 2, 2)


class CampPlus(nn.Module):
    """fbank [B, T, 80], its mean over time removed -> embedding [B, E].

    All rows of a batch count as full length (train on crops of one length). T is at least 3:
    the pooling takes a standard deviation over ceil(T / 2) frames.
    """

    def __init__(self, config: CampPlusConfig) -> None:
        super().__init__()
        self.config = config
        self.head = ConvHead(config)
        channels = config.init_channels
        layers: list[tuple[str, nn.Module]] = [("tdnn", TimeDelay(self.head.out_channels, channels))]
        for index, (count, dilation) in enumerate(zip(config.block_layers, config.block_dilations), start=1):
            layers.append((f"block{index}", dense_block(config, channels, count, dilation)))
            channels += count * config.growth_rate
            layers.append((f"transit{index}", Transit(channels, channels // 2)))
            channels //= 2
        layers += [
            ("out_nonlinear", norm_relu(channels)),
            ("stats", StatisticsPooling()),
            ("dense", Projection(2 * channels, config.embedding_size)),
        ]
        self.xvector = nn.Sequential(OrderedDict(layers))

    def forward(self, fbank: Tensor) -> Tensor:
        return self.xvector(self.head(fbank.transpose(1, 2)))


class ConvHead(nn.Module):
    """[B, mels, T] -> [B, C * mels / 8, T]: residual 2-D convolutions that shrink the mel axis by 8."""

    def __init__(self, config: CampPlusConfig) -> None:
        super().__init__()
        width = config.head_channels
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(ResidualBlock(width, stride=2), ResidualBlock(width, stride=1))
        self.layer2 = nn.Sequential(ResidualBlock(width, stride=2), ResidualBlock(width, stride=1))
        self.conv2 = nn.Conv2d(width, width, 3, stride=(2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.out_channels = width * (config.num_mels // 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = self.layer2(self.layer1(x))
        return F.relu(self.bn2(self.conv2(x))).flatten(1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; `stride` acts on the mel axis only."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, width, 1, stride=(stride, 1), bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class TimeDelay(nn.Module):
    """Convolution over 5 frames, stride 2: T -> ceil(T / 2)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, out_channels, 5, stride=2, padding=2, bias=False)
        self.nonlinear = norm_relu(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x))


class DenseLayer(nn.Module):
    """[B, C, T] -> [B, C + growth, T]: what it computes is appended to its input."""

    def __init__(self, config: CampPlusConfig, channels: int, dilation: int) -> None:
        super().__init__()
        width = config.bottleneck * config.growth_rate
        self.nonlinear1 = norm_relu(channels)
        self.linear1 = nn.Conv1d(channels, width, 1, bias=False)
        self.nonlinear2 = norm_relu(width)
        self.cam_layer = ContextGate(width, config.growth_rate, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))], dim=1)


class ContextGate(nn.Module):
    """Local convolution times a sigmoid mask made from the clip's and the segment's mean."""

    def __init__(self, channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(channels, channels // 2, 1)
        self.linear2 = nn.Conv1d(channels // 2, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(-1, keepdim=True) + segment_means(x)
        return self.linear_local(x) * torch.sigmoid(self.linear2(F.relu(self.linear1(context))))


class Transit(nn.Module):
    """Halves the channels between blocks."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.nonlinear = norm_relu(channels)
        self.linear = nn.Conv1d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.nonlinear(x))


class StatisticsPooling(nn.Module):
    """[B, C, T] -> [B, 2C]: mean and (unbiased) standard deviation over time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(-1), x.std(-1, unbiased=True)], dim=-1)


class Projection(nn.Module):
    """[B, C] -> [B, E], normalised per feature without a learned scale."""

    def __init__(self, channels: int, embedding_size: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, embedding_size, 1, bias=False)
        self.nonlinear = nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(embedding_size, affine=False)))

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x[..., None])[..., 0])


def segment_means(x: Tensor) -> Tensor:
    """Every frame of [B, C, T] replaced by the mean of its 100-frame segment (the last may be shorter)."""
    means = F.avg_pool1d(x, SEGMENT, stride=SEGMENT, ceil_mode=True)
    return means.repeat_interleave(SEGMENT, dim=-1)[..., : x.shape[-1]]


def norm_relu(channels: int) -> nn.Sequential:
    """Batch norm and ReLU."""
    return nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(channels), relu=nn.ReLU()))


def dense_block(config: CampPlusConfig, channels: int, count: int, dilation: int) -> nn.Sequential:
    """`count` dense layers, `tdnnd1` ... in order."""
    return nn.Sequential(
        OrderedDict(
            (f"tdnnd{i + 1}", DenseLayer(config, channels + i * config.growth_rate, dilation)) for i in range(count)
        )
    )
