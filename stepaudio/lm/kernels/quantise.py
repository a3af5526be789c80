"""Weights in fewer bits: how each precision stores a matrix, how it is made, and the plain way back.

    fp8    float8 e4m3 [N, K'], one float32 scale per row     value = q * scale
    int8   int32 words [N, K' / 4], one float32 scale per row value = (q - 128) * scale, q 1..255
    int4   int32 words [N, K' / 8], groups of 128 along K     value = q * scale + offset, q 0..15
           scale and offset of a group are bfloat16 in one int32 (scale in the lower half), [N, K' / 128]
    K' is K, filled up with zeros to a multiple of 16 (fp8), 64 (int8) or 128 (int4). Sixteen words are a run: field p
    (from the lowest) of word j of a run is its number 16 p + j, so that one field of neighbouring words meets
    neighbouring activations.

Knows nothing about kernels or layers. Legend: K in features, N out features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.errors import RequestError

PRECISIONS = ("bfloat16", "int8", "fp8", "int4")
GROUP = 128  # weights that share a scale in int4
RUN_WORDS = 16
WORD_BITS = {"int8": 8, "int4": 4}  # of a field, in the precisions stored in words
_EXCESS = 128  # what an int8 number is stored above its value, so that no field has a sign
_FP8_MAX = 448.0
_SHRINKS = (1.0, 0.94, 0.88, 0.82)  # of an int4 group's range: cutting its ends costs less than coarse steps
_ROWS_AT_ONCE = 2048  # rows quantised in one go, so that float32 copies stay small


@dataclass(frozen=True)
class Packed:
    """A weight matrix [rows, columns] as it is stored."""

    precision: str
    data: Tensor
    scale: Tensor | None  # None for unquantised weights
    columns: int  # K, without filling

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def run_length(bits: int) -> int:
    """Numbers in a run of words with fields of so many bits."""
    return RUN_WORDS * 32 // bits


def check_precision(precision: str) -> str:
    """The name itself; RequestError for one that is not in PRECISIONS."""
    if precision not in PRECISIONS:
        raise RequestError(f"precision {precision!r} is unknown: use {', '.join(PRECISIONS)}")
    return precision


@torch.no_grad()
def pack(weight: Tensor, precision: str) -> Packed:
    """Quantises [N, K] on its own device; "bfloat16" keeps it as it is, whatever its dtype."""
    check_precision(precision)
    columns = weight.shape[1]
    if precision == "bfloat16":
        return Packed(precision, weight.detach().contiguous(), None, columns)
    pieces = [_PACKERS[precision](part.float()) for part in weight.split(_ROWS_AT_ONCE)]
    data, scale = (torch.cat(parts) for parts in zip(*pieces))
    return Packed(precision, data, scale, columns)


@torch.no_grad()
def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [N, K] that the stored numbers stand for: the oracle of every kernel that reads them."""
    if packed.scale is None:
        return packed.data.to(dtype)
    if packed.precision == "int4":
        weight = _unpack_int4(packed.data, packed.scale)
    else:
        numbers = _numbers(packed.data, 8) - _EXCESS if packed.precision == "int8" else packed.data.float()
        weight = numbers * packed.scale[:, None]
    return weight[:, : packed.columns].to(dtype)


def _fill(weight: Tensor, multiple: int) -> Tensor:
    return F.pad(weight, (0, -weight.shape[1] % multiple))


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    numbers = _fill((weight / scale[:, None]).round(), RUN_WORDS * 4)
    return _words(numbers + _EXCESS, 8), scale


def _pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1) / _FP8_MAX).clamp(min=1e-12)
    scaled = (weight / scale[:, None]).clamp(-_FP8_MAX, _FP8_MAX)  # beyond the range lies NaN
    return _fill(scaled, 16).to(torch.float8_e4m3fn), scale


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per group the range, shrunk or not, that gives the smallest squared error."""
    groups = _fill(weight, GROUP).unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for shrink in _SHRINKS:
        scale = ((high - low) * (shrink / 15)).clamp(min=1e-12).bfloat16().float()
        offset = ((low + high) / 2 - 7.5 * scale).bfloat16().float()
        numbers = ((groups - offset) / scale).round().clamp(0, 15)
        error = (numbers * scale + offset - groups).square().sum(2, keepdim=True)
        found = (error, numbers, scale, offset)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
    _, numbers, scale, offset = best
    both = torch.cat([scale, offset], 2).bfloat16()  # little endian: the scale is the lower half
    return _words(numbers.flatten(1), 4), both.view(torch.int32).squeeze(2).contiguous()


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers [N, K'] below 2^bits -> int32 words [N, K' * bits / 32] in the order of runs."""
    fields = 32 // bits
    shifts = bits * torch.arange(fields, device=numbers.device)
    runs = numbers.to(torch.int64).unflatten(1, (-1, fields, RUN_WORDS))
    words = (runs << shifts[:, None]).sum(2).flatten(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """Words [N, W] -> the whole numbers they hold, float32 [N, W * 32 / bits]."""
    shifts = bits * torch.arange(32 // bits, device=words.device, dtype=torch.int32)
    fields = (words.unflatten(1, (-1, 1, RUN_WORDS)) >> shifts[:, None]) & (2**bits - 1)
    return fields.flatten(1).float()


def _unpack_int4(words: Tensor, packed_scale: Tensor) -> Tensor:
    numbers = _numbers(words, 4).unflatten(1, (-1, GROUP))
    both = packed_scale.contiguous().view(torch.bfloat16).unflatten(1, (-1, 2)).float()
    return (numbers * both[:, :, :1] + both[:, :, 1:]).flatten(1)


_PACKERS = {"int8": _pack_int8, "fp8": _pack_fp8, "int4": _pack_int4}
