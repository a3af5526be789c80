"""The semantic tokenizer: sound at 16 kHz -> 25 codes per second, each 0..4095.

`SemanticEncoder` is the model (differentiable up to the hidden states, the codebook look-up apart);
`SemanticTokenizer` cuts sound into windows and batches them. Knows nothing about the linguistic stream.
Legend: B batch, T mel frames, S = ceil(ceil(T / 2) / 2) codes, D width, H heads, K codebook size.
Source: formats.md section 6.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.errors import CheckpointError, RequestError
from tokenizer.files import require_file
from tokenizer.graphs import GraphPool, check_engine
from tokenizer.log_mel import HOP_LENGTH, log_mel, padded_log_mel
from tokenizer.onnx_weights import read_semantic_onnx
from tokenizer.packed import pack
from tokenizer.split import split
from tokenizer.weights import build

SAMPLE_RATE = 16_000
CODE_RATE = 25
WINDOW = 480_000  # samples heard together: 30 s, without overlap
MIN_WINDOW = 480  # samples below which the last piece is dropped
_GRAPHS, _GRAPH_SECONDS = 16, 64  # kept, and padded seconds of one; larger batches keep the device busy anyway
_COUNT_SLACK = 2  # codes by which a window may differ from 25 per second


@dataclass(frozen=True)
class SemanticConfig:
    """Sizes of the model; the defaults are the release's."""

    num_mels: int = 128
    width: int = 1280
    num_heads: int = 20
    num_layers: int = 6
    mlp_width: int = 5120
    num_positions: int = 1500  # rows of the position table: the most codes one window can have
    codebook_size: int = 4096
    strides: tuple[int, int] = (2, 2)  # of the two convolutions

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_heads: int, strides: tuple[int, int]) -> SemanticConfig:
        """The sizes that named tensors imply. Raises KeyError if one of those looked at is missing."""
        width, num_mels, _ = tensors["encoder.conv1.weight"].shape
        return cls(
            num_mels=num_mels,
            width=width,
            num_heads=num_heads,
            num_layers=len({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.")}),
            mlp_width=len(tensors["encoder.blocks.0.mlp.0.weight"]),
            num_positions=len(tensors["encoder.positional_embedding"]),
            codebook_size=len(tensors["quantizer._codebook.embed"]),
            strides=strides,
        )


class StridedConv(nn.Conv1d):
    """GELU(convolution) over time, kernel 3 and padding 1, [B, T, C] -> [B, ceil(T / stride), D].

    A matrix product over gathered frames: no layout change per call, and full float32 on a GPU,
    where convolutions may round to TF32.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, self.stride[0]).flatten(2)  # [B, T', C * 3]
        return F.gelu(F.linear(frames, self.weight.flatten(1), self.bias))

    def count(self, frames: Tensor) -> Tensor:
        """Frames out for frames in."""
        return (frames - 1) // self.stride[0] + 1


class Attention(nn.Module):
    """Full attention; the key projection has no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = [
            part(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        ]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, [B, S, D] -> [B, S, D]."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.num_heads)
        self.attn_ln = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, config.width)
        )
        self.mlp_ln = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Whisper's encoder with two strided convolutions and without its last norm."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.conv1 = StridedConv(config.num_mels, config.width, config.strides[0])
        self.conv2 = StridedConv(config.width, config.width, config.strides[1])
        self.register_buffer("positional_embedding", sinusoids(config.num_positions, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, mel: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = mel.transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = conv(x if lengths is None else x * _valid(lengths, x.shape[1])[..., None])
            lengths = None if lengths is None else conv.count(lengths)
        assert x.shape[1] <= len(self.positional_embedding), f"{x.shape[1]} codes exceed the position table"
        x = x + self.positional_embedding[: x.shape[1]]
        mask = None if lengths is None else _valid(lengths, x.shape[1])[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return x, lengths


class Codebook(nn.Module):
    """K code vectors [K, D]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(F.normalize(torch.randn(size, width), dim=-1))


class Quantizer(nn.Module):
    """Nearest code to the L2-normalised hidden state, [B, S, D] -> int64 [B, S]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self._codebook = Codebook(size, width)

    @property
    def codebook(self) -> Tensor:
        return self._codebook.embed

    def forward(self, hidden: Tensor) -> Tensor:
        half_square = torch.linalg.vector_norm(self.codebook, dim=-1).square() / 2
        return F.linear(F.normalize(hidden, dim=-1), self.codebook, -half_square).argmax(dim=-1)


class SemanticEncoder(nn.Module):
    """Log-mel -> hidden states -> codes, by the names of the published weights."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.quantizer = Quantizer(config.codebook_size, config.width)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SemanticEncoder:
        """Weights and sizes of `speech_tokenizer_v1.onnx`; raises CheckpointError naming file and key."""
        file = read_semantic_onnx(path)
        try:
            config = SemanticConfig.from_tensors(file.tensors, file.num_heads, file.strides)
        except KeyError as error:
            raise CheckpointError(f"{path} is not the semantic tokenizer: it has no weight {error}") from None
        if config.width % config.num_heads:
            raise CheckpointError(f"{path}: width {config.width} does not split into {config.num_heads} heads")
        return build(lambda: cls(config), file.tensors, str(path))

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, 128, T], `lengths` [B] in frames (at least 1; None: all T) -> hidden [B, S, D] and their lengths.

        Differentiable. Padding has no influence on what lies before it; hidden states there mean nothing.
        """
        return self.encoder(mel, lengths)

    def quantize(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, S, D] -> codes int64 [B, S]; not differentiable."""
        return self.quantizer(hidden)


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's position table [length, width]: sines, then cosines, of width / 2 frequencies."""
    step = math.log(10_000) / (width // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _valid(lengths: Tensor, size: int) -> Tensor:
    """bool [B, size]: which places lie within the length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Backend(Protocol):
    """Something that turns a padded batch [B, 128, T] with lengths [B] into one code array per item."""

    def __call__(self, mel: Tensor, lengths: Tensor) -> list[np.ndarray]: ...


class TorchBackend:
    """The PyTorch model. `encode` goes from sound to codes in one go; on a CUDA device small batches are graphs."""

    def __init__(self, model: SemanticEncoder) -> None:
        self.model = model
        device = model.quantizer.codebook.device
        self.pool = GraphPool(device, _GRAPHS) if device.type == "cuda" else None

    def encode(self, samples: Tensor, lengths: Sequence[int]) -> list[np.ndarray]:
        """Padded sound [B, N] on the CPU -> one code array per item."""
        device, (batch, size) = self.model.quantizer.codebook.device, samples.shape
        wide, rows = -(-size // SAMPLE_RATE) * SAMPLE_RATE, 1 << (batch - 1).bit_length()
        graph = self.pool is not None and rows * wide <= _GRAPH_SECONDS * SAMPLE_RATE
        counts = list(lengths)
        if graph:
            samples = F.pad(samples, (0, wide - size, 0, rows - batch))
            counts += [MIN_WINDOW] * (rows - batch)
        inputs = samples.to(device), torch.tensor(counts).to(device)
        codes = self.pool.run((rows, wide), self.codes, *inputs) if graph else self.codes(*inputs)
        codes = codes[:batch].cpu().numpy()
        return [row[: self.count(length)] for row, length in zip(codes, lengths)]

    def codes(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """[B, N] and lengths [B] -> codes [B, S], meaningless behind an item's own."""
        hidden, _ = self.model(padded_log_mel(samples, lengths), lengths // HOP_LENGTH)
        return self.model.quantize(hidden)

    def count(self, samples: int) -> int:
        """Codes of so many samples."""
        frames = samples // HOP_LENGTH
        for stride in self.model.config.strides:
            frames = (frames - 1) // stride + 1
        return frames

    def __call__(self, mel: Tensor, lengths: Tensor) -> list[np.ndarray]:
        full = bool((lengths == mel.shape[2]).all())  # without a mask attention takes its fastest path
        hidden, counts = self.model(mel, None if full else lengths)
        codes = self.model.quantize(hidden).cpu().numpy()
        return list(codes) if counts is None else [row[:count] for row, count in zip(codes, counts.tolist())]


class OnnxBackend:
    """The released file in onnxruntime, one clip at a time, inputs by position (formats.md 6.1)."""

    def __init__(self, path: str | os.PathLike[str], device: torch.device) -> None:
        path = require_file(path, "semantic tokenizer")
        providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads yield to torch
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise CheckpointError(f"{path} cannot be opened by onnxruntime: {str(error).splitlines()[0]}") from None
        if device.type == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RequestError(f"onnxruntime found no working {device}: use the torch backend or device cpu")
        self.names = [value.name for value in self.session.get_inputs()]
        if len(self.names) != 2:
            raise CheckpointError(f"{path} has {len(self.names)} inputs, the semantic tokenizer has 2")

    def __call__(self, mel: Tensor, lengths: Tensor) -> list[np.ndarray]:
        mel = mel.cpu().numpy()
        inputs = [(row[None, :, :frames], np.array([frames], np.int32)) for row, frames in zip(mel, lengths.tolist())]
        return [self.session.run(None, dict(zip(self.names, pair)))[0].reshape(-1) for pair in inputs]


def _providers(device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RequestError(f"this onnxruntime cannot run on {device}: use the torch backend or device cpu")
    return [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}), "CPUExecutionProvider"]


class SemanticTokenizer:
    """Clips at 16 kHz -> codes, through either backend."""

    def __init__(self, backend: Backend, device: str | torch.device = "cpu", engine: str = "auto") -> None:
        self.backend = backend
        self.device = torch.device(device)
        self.whole = engine == "auto" and self.device.type == "cuda" and isinstance(backend, TorchBackend)
        self.batch_frames = 96_000 if self.device.type == "cuda" else 6_000  # mel frames, padding included

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        backend: str = "torch",
        engine: str = "auto",
    ) -> SemanticTokenizer:
        """Opens `speech_tokenizer_v1.onnx`; backend "torch" or "onnx" (same codes, the released graph).

        `engine` "auto" batches on a CUDA device as `TorchBackend.encode` does; "plain" runs the modules as written.
        """
        check_engine(engine)
        if backend == "torch":
            model = SemanticEncoder.from_file(path).to(device)
            model = pack(model) if engine == "plain" else pack(split(model))
            return cls(TorchBackend(model), device, engine)
        if backend == "onnx":
            return cls(OnnxBackend(path, torch.device(device)), device)
        raise RequestError(f'semantic backend must be "torch" or "onnx", not {backend!r}')

    @torch.inference_mode()
    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 [N] each -> int64 [S] each; a clip under 480 samples has no codes.

        Windows of 30 s are encoded by themselves, in batches of bounded size.
        Raises CheckpointError if the model does not give 25 codes per second.
        """
        windows = [(i, piece) for i, clip in enumerate(clips) for piece in _windows(clip)]
        codes: list[np.ndarray] = [np.zeros(0, np.int64)] * len(windows)
        for batch in _batches([len(piece) for _, piece in windows], self.batch_frames):
            for at, row in zip(batch, self._encode_batch([windows[at][1] for at in batch])):
                codes[at] = row
        joined: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in clips]
        for (i, _), row in zip(windows, codes):
            joined[i].append(row)
        return [np.concatenate(rows) for rows in joined]

    def _encode_batch(self, pieces: list[np.ndarray]) -> list[np.ndarray]:
        padded = np.zeros((len(pieces), max(map(len, pieces))), np.float32)
        for row, piece in zip(padded, pieces):
            row[: len(piece)] = piece
        if self.whole:
            codes = self.backend.encode(torch.from_numpy(padded), [len(piece) for piece in pieces])
        else:
            lengths = torch.tensor([len(piece) for piece in pieces], device=self.device)
            mel = log_mel(torch.from_numpy(padded).to(self.device), lengths)
            codes = self.backend(mel, lengths // HOP_LENGTH)
        for row, piece in zip(codes, pieces):
            _check_count(len(row), len(piece))
        return codes


def _windows(clip: np.ndarray) -> Iterator[np.ndarray]:
    assert clip.ndim == 1, f"a clip must have the shape [N], not {clip.shape}"
    for start in range(0, len(clip), WINDOW):
        if len(clip) - start >= MIN_WINDOW:
            yield clip[start : start + WINDOW]


def _batches(lengths: Sequence[int], frames: int) -> Iterator[list[int]]:
    """Indices, longest first, in groups that hold at most `frames` mel frames once padded."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * (lengths[batch[0]] // HOP_LENGTH) > frames:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _check_count(count: int, samples: int) -> None:
    expected = round(samples / SAMPLE_RATE, 2) * CODE_RATE
    if abs(count - expected) > _COUNT_SLACK:
        raise CheckpointError(
            f"the semantic tokenizer gave {count} codes for {samples / SAMPLE_RATE:.2f} s, "
            f"expected {expected:.0f} (25 per second): its file is another tokenizer's"
        )
