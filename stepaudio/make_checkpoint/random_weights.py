"""Random weights that behave: finite activations, codes that vary, a pitch, replies that end.

Every function takes a seed and leaves the global generator as it was.
Legend: V vocabulary, H width, D encoder width, K codebook size.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor, nn

from cosyvoice.campplus import CampPlus, CampPlusConfig
from cosyvoice.config import FlowConfig, HiFTConfig
from cosyvoice.flow import TokenToMel
from cosyvoice.hift import HiFTVocoder
from cosyvoice.speaker import speaker_features
from stepaudio.export.lm_files import Blocks
from stepaudio.lm.geometry import EMBEDDING, HEAD, Geometry, Shape
from tokenizer.codes import LAYOUT
from tokenizer.fbank import ROW_SIZE, Cmvn, FrontEnd
from tokenizer.log_mel import log_mel
from tokenizer.sanm import SanmConfig, SanmEncoder
from tokenizer.semantic import SemanticConfig, SemanticEncoder

_BLOCK = 2**25  # numbers drawn at once
_CROP = 100  # fbank frames
_STEADY = 3.0  # value of the embedding's first column, the same for every piece
_STOP_RANK = 20  # <|EOT|> is about the 20th likeliest of the pieces that may come: replies end by themselves
_UNLIKELY = -20.0  # logit of what the model should not say
_PITCH, _PITCH_SWING = 160.0, 60.0  # Hz, of a mel around the level below
_MEL_LEVEL = -5.0  # natural log, of quiet speech
_WAVE_LEVEL = 1.0  # natural log of the STFT magnitudes

_Type = sentencepiece_model_pb2.ModelProto.SentencePiece
M = TypeVar("M", bound=nn.Module)


def seeded(make: Callable[[], M], seed: int) -> M:
    """`make()` with the usual initialisation of its layers, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def cmvn() -> Cmvn:
    """Normalisation that brings log filter banks of sound at int16 scale to about zero mean, unit deviation."""
    bins = torch.linspace(0, 1, ROW_SIZE // 7)
    return Cmvn((-11.5 - 2.0 * torch.sin(math.pi * bins)).repeat(7), (0.22 + 0.05 * bins).repeat(7))


@torch.inference_mode()
def linguistic(config: SanmConfig, clips: Sequence[np.ndarray], seed: int) -> tuple[SanmEncoder, Tensor]:
    """Encoder and codebook [1024, D]: centroids lie among the encoder's outputs for `clips` (16 kHz)."""
    encoder = seeded(lambda: SanmEncoder(config), seed)
    front_end = FrontEnd(cmvn())
    vectors = torch.cat([encoder(front_end.rows(torch.from_numpy(clip), 1.0, seed)[None])[0] for clip in clips])
    return encoder, _among(vectors, 1024, seed)


@torch.inference_mode()
def semantic(config: SemanticConfig, clips: Sequence[np.ndarray], seed: int) -> SemanticEncoder:
    """Model whose codebook lies among its normalised hidden states for `clips` (16 kHz)."""
    model = seeded(lambda: SemanticEncoder(config), seed)
    hidden = torch.cat([model(log_mel(torch.from_numpy(clip)[None]))[0][0] for clip in clips])
    codebook = F.normalize(_among(F.normalize(hidden, dim=-1), config.codebook_size, seed), dim=-1)
    model.quantizer.codebook.copy_(codebook)
    return model


def _among(vectors: Tensor, count: int, seed: int) -> Tensor:
    """`count` vectors on the lines between pairs of the given ones, with a little noise: [count, D]."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(vectors), (2, count), generator=generator)
    share = torch.rand(count, 1, generator=generator) / 2
    noise = torch.randn(count, vectors.shape[1], generator=generator) * vectors.std(dim=0) * 0.1
    return vectors[first] * (1 - share) + vectors[second] * share + noise


def speaker_encoder(config: CampPlusConfig, clips: Sequence[np.ndarray], seed: int) -> CampPlus:
    """CAM++ whose running statistics are those of crops of `clips` (16 kHz), so that its embeddings keep a scale."""
    model = seeded(lambda: CampPlus(config), seed).train()
    features = [speaker_features(torch.from_numpy(clip)) for clip in clips]
    crops = torch.stack([crop for rows in features for crop in rows.split(_CROP) if len(crop) == _CROP])
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(seed))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.cat([crops, crops + noise, crops + 3 * noise, 3 * noise]))
    return model.eval()


@torch.no_grad()
def flow(config: FlowConfig, seed: int) -> TokenToMel:
    """Token-to-mel model whose mels lie around the level of quiet speech."""
    model = seeded(lambda: TokenToMel(config), seed)
    model.decoder.estimator.final_proj.bias.fill_(_MEL_LEVEL)
    return model


@torch.no_grad()
def vocoder(config: HiFTConfig, seed: int) -> HiFTVocoder:
    """Vocoder with a speaking pitch and a quiet wave that changes with the mel."""
    model = seeded(lambda: HiFTVocoder(config), seed)
    predictor = model.f0_predictor
    for layer in predictor.condnet[::2]:
        layer.weight.mul_(math.sqrt(3))  # keeps the deviation from layer to layer
    predictor.classifier.weight.mul_(_PITCH_SWING)
    predictor.classifier.bias.fill_(_PITCH)
    bins = config.istft_n_fft // 2 + 1
    model.conv_post.weight.mul_(50 / math.sqrt(model.conv_post.weight[0].numel()))
    model.conv_post.bias[:bins] = _WAVE_LEVEL
    return model


def leaning(model: sentencepiece_model_pb2.ModelProto, speaks: bool) -> Tensor:
    """Logit offset of each piece [V]: a model that speaks says audio pieces only, another one text only."""
    kinds = [_kind(piece) for piece in model.pieces]
    said = torch.tensor([kind == ("audio" if speaks else "text") for kind in kinds])
    lean = torch.where(said, 0.0, _UNLIKELY)
    choices = LAYOUT.linguistic_size if speaks else int(said.sum())  # speech stops where a group begins
    lean[kinds.index("stop")] = NormalDist().inv_cdf(1 - _STOP_RANK / choices)
    return lean


def _kind(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> str:
    if piece.piece == "<|EOT|>":
        return "stop"
    if piece.type == _Type.USER_DEFINED and re.fullmatch(r"<audio_\d+>", piece.piece):
        return "audio"
    return "text" if piece.type == _Type.NORMAL else "special"


def language_model(geometry: Geometry, lean: Tensor, seed: int) -> Blocks:
    """Rows of each tensor, drawn when asked for; a tensor's numbers depend on the seed and its name only.

    Residual branches are scaled down by depth, so the hidden state keeps its size. The first column of
    the embedding is constant: read by the first column of the head, it carries `lean` to the logits.
    """
    depth = math.sqrt(2 * geometry.num_hidden_layers)

    def blocks(name: str, shape: Shape) -> Iterator[Tensor]:
        if len(shape) == 1:
            yield torch.ones(shape)
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        scale = 1.0 if name.startswith(EMBEDDING) else shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= depth
        step = max(1, _BLOCK // shape[1])
        for start in range(0, shape[0], step):
            rows = torch.randn(min(step, shape[0] - start), shape[1], generator=generator) * scale
            if name.startswith(EMBEDDING):
                rows[:, 0] = _STEADY
            elif name.startswith(HEAD):
                rows[:, 0] = lean[start : start + len(rows)] * _reading(geometry)
            yield rows

    return blocks


def _reading(geometry: Geometry) -> float:
    """Weight that reads 1 off the steady column after the last norm, where the other columns have a variance near 2."""
    return math.sqrt(2 + _STEADY**2 / geometry.hidden_size) / _STEADY


def other_tensors(config: SanmConfig, symbols: int, seed: int) -> Mapping[str, Tensor]:
    """A few of the tensors that the released model.pt holds beside the encoder."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "decoder.embed.0.weight": (symbols, config.size),
        "decoder.output_layer.weight": (symbols, config.size),
        "decoder.output_layer.bias": (symbols,),
        "predictor.cif_conv1d.weight": (config.size, config.size, 3),
        "predictor.cif_output.weight": (1, config.size),
    }
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
