"""Interleaved codes to mel: embedding, encoder, length regulator and flow matching.

Knows codes, prompt mels and speaker embeddings; knows nothing of text, of sound or of where the noise comes from.
A batch pads requests of different lengths; padding changes no result, and without padding no mask is made.
Module names are the key names of `flow.pt`. Source: formats.md sections 7.2, 7.3; quirks Q5, Q6, Q21.
Shapes: B batch, N codes (prompt, then target), T mel frames (prompt, then target), D width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from cosyvoice.cfm import ConditionalCFM
from cosyvoice.config import FlowConfig
from cosyvoice.conformer import ConformerEncoder
from cosyvoice.unet import MaskedGroupNorm, masked
from tokenizer.errors import RequestError
from tokenizer.weights import build, read_tensors

if TYPE_CHECKING:
    from cosyvoice.flow_engine import FlowEngine

_EMPTY_ROW = (0, 0, 1, 2)  # prompt codes, prompt frames, codes and frames of a row that only fills up a batch


def num_frames(num_codes: int, config: FlowConfig) -> int:
    """Mel frames that stand for `num_codes` interleaved codes (5 -> 10), in the release's order of operations."""
    return int(num_codes / config.input_frame_rate * config.sample_rate / config.hop_size)


@dataclass(frozen=True, eq=False)
class FlowRequest:
    """What one utterance is made from. The prompt's codes and mel are both there or both empty."""

    codes: Tensor  # [n] int64, n > 0; a code below 0 is taken as 0
    prompt_codes: Tensor  # [p] int64, may be empty
    prompt_mel: Tensor  # [T1, 80]
    embedding: Tensor  # [192] speaker
    noise: Tensor  # [80, T1 + num_frames(n)] standard normal


@dataclass(frozen=True, eq=False)
class FlowBatch:
    """Requests padded to one shape, on the model's device and in its dtype. Lengths are None without padding."""

    codes: Tensor  # [B, N] int64, prompt then target
    prompt_codes: Tensor  # [B] how many of them are the prompt's
    prompt_frames: Tensor  # [B]
    code_lengths: Tensor | None  # [B]
    frame_lengths: Tensor | None  # [B]
    prompt_mel: Tensor  # [B, 80, T], zero after the prompt
    embedding: Tensor  # [B, 192]
    noise: Tensor  # [B, 80, T]


def collate(
    requests: Sequence[FlowRequest],
    config: FlowConfig,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] | None = None,
) -> FlowBatch:
    """One padded batch; with `sizes` (B, T, N) padded up to those, rows without a request included.

    Raises RequestError for a request that cannot be served, with its values.
    """
    for request in requests:
        _check(request, config)
    codes = [torch.cat([request.prompt_codes, request.codes]).cpu() for request in requests]
    counts = [(len(r.prompt_codes), len(r.prompt_mel), len(row), r.noise.shape[-1]) for r, row in zip(requests, codes)]
    longest = [max(column) for column in zip(*counts)]
    batch, frames, places = sizes or (len(requests), longest[3], longest[2])
    counts += [_EMPTY_ROW] * (batch - len(requests))
    lengths = torch.tensor(counts).T.contiguous().to(device)  # one copy for all of them
    padded = torch.zeros(batch, places, dtype=torch.long)
    for row, known in zip(padded, codes):
        row[: len(known)] = known
    noises = [F.pad(r.noise, (0, frames - r.noise.shape[-1])) for r in requests]
    return FlowBatch(
        codes=padded.to(device),
        prompt_codes=lengths[0],
        prompt_frames=lengths[1],
        code_lengths=None if _equal(counts, 2, sizes) else lengths[2],
        frame_lengths=None if _equal(counts, 3, sizes) else lengths[3],
        prompt_mel=_rows([_padded_mel(r.prompt_mel, frames, device, dtype) for r in requests], batch),
        embedding=_rows([_on_device(r.embedding, device, dtype) for r in requests], batch),
        noise=_rows([noise.to(device).to(dtype) for noise in noises], batch),
    )


def _equal(counts: list[tuple[int, int, int, int]], column: int, sizes: tuple[int, int, int] | None) -> bool:
    """Whether no row has padding, as far as this count goes."""
    return sizes is None and len({count[column] for count in counts}) == 1


def _rows(values: list[Tensor], batch: int) -> Tensor:
    """Stacked, with rows of zeros up to the batch."""
    return torch.stack(values + [torch.zeros_like(values[0])] * (batch - len(values)))


def _padded_mel(mel: Tensor, frames: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[T1, M] -> [M, frames]."""
    return F.pad(_on_device(mel, device, dtype).T, (0, frames - len(mel)))


_copies = WeakIdKeyDictionary()  # what belongs to a voice, by the tensor on the host: copied once


def _on_device(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A voice's tensor where the model is. On a GPU the copy is kept for as long as the original lives."""
    if device.type != "cuda" or value.device.type == "cuda":
        return value.to(device, dtype)
    kept = _copies.get(value)
    if kept is None or kept.device != device or kept.dtype != dtype:
        kept = value.to(device).to(dtype)
        _copies[value] = kept
    return kept


class LengthRegulator(nn.Module):
    """Encoder output at the codes' rate -> mu at the mel's rate; prompt and target are stretched separately."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.Conv1d(channels, channels, 3, padding=1), MaskedGroupNorm(1, channels), nn.Mish()]
        self.model = nn.Sequential(*parts, nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, T] -> [B, C, T]; mask [B, 1, T] is 1 where valid."""
        for layer in self.model:
            x = layer(x, mask) if isinstance(layer, MaskedGroupNorm) else layer(masked(x, mask))
        return masked(x, mask)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where prompt and target lie in each row: `prompt` and `total` lengths, [B] each."""

    prompt: Tensor
    total: Tensor

    def pick(self, in_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """First position and length of the segment of each frame, [B, T]."""
        prompt = self.prompt[:, None]
        return torch.where(in_prompt, 0, prompt), torch.where(in_prompt, prompt, self.total[:, None] - prompt)


def stretch(x: Tensor, num_frames: int, codes: Segments, frames: Segments) -> Tensor:
    """Linear interpolation of [B, N, C] to [B, C, T], half-pixel centres, within prompt and target apart."""
    frame = torch.arange(num_frames, device=x.device)
    in_prompt = frame < frames.prompt[:, None]
    first, size_in = codes.pick(in_prompt)
    first_out, size_out = frames.pick(in_prompt)
    scale = size_in.float() / size_out.float()
    position = ((frame - first_out).float() + 0.5) * scale - 0.5
    position = position.clamp(min=0).minimum((size_in - 1).float())  # the upper bound only meets padding
    left = position.long()
    right = (left + 1).minimum(size_in - 1)
    share = (position - left)[..., None]  # fp32, as is the sum below when x is bf16
    rows = torch.arange(len(x), device=x.device)[:, None]
    mixed = (1 - share) * x[rows, first + left] + share * x[rows, first + right]
    return mixed.to(x.dtype).transpose(1, 2)


class TokenToMel(nn.Module):
    """The flow model of the release (`flow.pt`)."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.engine: FlowEngine | None = None  # how `generate` runs; None: as written here
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = ConformerEncoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        self.length_regulator = LengthRegulator(config.output_size, config.regulator_layers)
        self.decoder = ConditionalCFM(config)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        config: FlowConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TokenToMel:
        """Reads `flow.pt` (or the same tensors as .safetensors) strictly; the whole model runs in `dtype`.

        Raises CheckpointError for a file that is missing, damaged or disagrees with the config.
        """
        model = build(lambda: cls(config), read_tensors(path, "flow model"), str(path))
        return model.to(device=device, dtype=dtype)

    def encode(
        self,
        codes: Tensor,
        num_frames: int,
        code_lengths: Tensor | None = None,
        frame_lengths: Tensor | None = None,
        prompt_codes: Tensor | None = None,
        prompt_frames: Tensor | None = None,
    ) -> Tensor:
        """Codes [B, N] -> mu [B, 80, num_frames], zero at padding.

        Lengths are [B]; None means every code or frame is valid, and no prompt. Without a prompt (as in training) the
        whole row is stretched from its codes to its frames.
        """
        whole = torch.ones(len(codes), dtype=torch.long, device=codes.device)
        none = torch.zeros_like(whole)
        code_mask = None if code_lengths is None else _mask(code_lengths, codes.shape[1])
        hidden = self.encoder(self.input_embedding(codes.clamp(min=0)), code_mask)
        stretched = stretch(
            self.encoder_proj(hidden),
            num_frames,
            codes=Segments(
                none if prompt_codes is None else prompt_codes,
                codes.shape[1] * whole if code_lengths is None else code_lengths,
            ),
            frames=Segments(
                none if prompt_frames is None else prompt_frames,
                num_frames * whole if frame_lengths is None else frame_lengths,
            ),
        )
        return self.length_regulator(stretched, self.frame_mask(frame_lengths, num_frames))

    def frame_mask(self, frame_lengths: Tensor | None, num_frames: int) -> Tensor | None:
        """[B] -> [B, 1, num_frames] in the model's dtype, 1 where valid; None stays None."""
        if frame_lengths is None:
            return None
        return _mask(frame_lengths, num_frames)[:, None].to(self.encoder_proj.weight.dtype)

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speaker embedding [B, 192] -> condition [B, 80]."""
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1))

    def forward(self, batch: FlowBatch, num_steps: int = 10) -> Tensor:
        """Mel [B, 80, T] of prompt and target, zero at padding, in the model's dtype."""
        frames = batch.noise.shape[-1]
        mu = self.encode(
            batch.codes, frames, batch.code_lengths, batch.frame_lengths, batch.prompt_codes, batch.prompt_frames
        )
        mask = self.frame_mask(batch.frame_lengths, frames)
        return self.decoder(batch.noise, mask, mu, self.speaker(batch.embedding), batch.prompt_mel, num_steps)

    def generate(self, requests: Sequence[FlowRequest], num_steps: int = 10) -> list[Tensor]:
        """The target's mel [80, num_frames(n)] of each request, as one padded batch; a request's result does not
        depend on its neighbours. Raises RequestError for bad requests or fewer than one step.
        """
        if self.engine is not None:
            return self.engine.generate(requests, num_steps)
        weight = self.encoder_proj.weight
        mel = self(collate(requests, self.config, weight.device, weight.dtype), num_steps)
        return [row[:, len(r.prompt_mel) : r.noise.shape[-1]] for row, r in zip(mel, requests)]


def _mask(lengths: Tensor, size: int) -> Tensor:
    """[B] -> [B, size], True where valid."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _check(request: FlowRequest, config: FlowConfig) -> None:
    frames = num_frames(len(request.codes), config)
    if frames == 0:
        raise RequestError(f"nothing to decode: {len(request.codes)} audio codes give no mel frame")
    for codes in (request.codes, request.prompt_codes):
        if len(codes) and int(codes.max()) >= config.vocab_size:
            raise RequestError(f"audio code {int(codes.max())} is outside 0..{config.vocab_size - 1}")
    if bool(len(request.prompt_codes)) != bool(len(request.prompt_mel)):
        raise RequestError(
            f"a voice prompt needs codes and mel: this one has {len(request.prompt_codes)} codes "
            f"and {len(request.prompt_mel)} mel frames"
        )
    expected = {
        "prompt mel": (request.prompt_mel, (len(request.prompt_mel), config.output_size)),
        "speaker embedding": (request.embedding, (config.spk_embed_dim,)),
        "noise": (request.noise, (config.output_size, len(request.prompt_mel) + frames)),
    }
    for name, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise RequestError(f"{name} has shape {tuple(value.shape)}, this model takes {shape}")
