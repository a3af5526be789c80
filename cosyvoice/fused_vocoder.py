"""The vocoder with its residual blocks, nearly all of its work, on the tensor cores of a Hopper GPU.

Pitch, source, STFT and resampling layers are those of `HiFTVocoder`, in full float32, and `HiFTVocoder` is the oracle.
Precision: "float32" carries every value as two bfloat16 numbers, "float16" rounds the residual blocks' inputs and
weights to float16 (10 bits of mantissa, those of TF32). Legend: as in `hift.py`; L samples at a stage's rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosyvoice.hift import HiFTVocoder, ResBlock, SourceDraws, Vocoded

PRECISIONS = ("float32", "float16")
_FRAMES, _CHANNELS, _DEPTH = 128, 128, 64  # of one program: samples, output channels, input channels at a time


def unsupported(vocoder: HiFTVocoder) -> str | None:
    """Why this vocoder cannot run here; None if it can."""
    from cosyvoice.wave_kernels import triton

    device = vocoder.conv_pre.weight.device
    widths = sorted({block.convs1[0].in_channels for block in (*vocoder.resblocks, *vocoder.source_resblocks)})
    if any(width % 16 for width in widths):
        return f"widths {widths} are not multiples of 16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU is older than compute capability 9.0"
    return "Triton is not installed" if triton is None else None


class _Block:
    """A residual block whose weights are split once: [taps, inputs, outputs]."""

    def __init__(self, block: ResBlock, split: bool) -> None:
        self.width = block.convs1[0].in_channels
        self.split, self.dtype = split, torch.bfloat16 if split else torch.float16
        convs = [conv for pair in zip(block.convs1, block.convs2) for conv in pair]
        self.alphas = [snake.alpha for pair in zip(block.activations1, block.activations2) for snake in pair]
        self.convs = [(*self._parts(conv.weight), conv.bias, conv.kernel_size[0], conv.dilation[0]) for conv in convs]

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = weight.detach().permute(2, 1, 0).contiguous()
        hi = weight.to(self.dtype)
        return hi, (weight - hi.float()).to(self.dtype) if self.split else None

    def __call__(self, x: Tensor, lengths: Tensor, out: Tensor, mix: Tensor | None = None, scale: float = 1.0) -> None:
        """out = scale * block(x) [+ mix], float32 [B, L, C], where valid. `out` may be `mix`."""
        parts = self._snake(x, self.alphas[0], lengths)
        residual, last = x, len(self.convs) - 1
        for index in range(0, last, 2):
            parts = self._conv(index, parts, lengths)
            if index + 1 < last:
                kept = torch.empty_like(x)
                parts = self._conv(index + 1, parts, lengths, residual, kept)
                residual = kept
        self._conv(last, parts, lengths, residual, out, mix, scale)

    def _snake(self, x: Tensor, alpha: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        from cosyvoice.wave_kernels import snake_kernel

        batch, size, width = x.shape
        hi, lo = self._empty(x)
        snake_kernel[(-(-size // 32), batch)](
            x, alpha, hi, lo, lengths, size, C=width, CP=max(16, 1 << (width - 1).bit_length()), BM=32,
            SPLIT=self.split, num_warps=4,
        )  # fmt: skip
        return hi, lo

    def _conv(
        self,
        index: int,
        parts: tuple[Tensor, Tensor],
        lengths: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        mix: Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Convolution `index`; returns the parts of the snake before the next one."""
        from cosyvoice.wave_kernels import wave_conv_kernel

        (hi, lo), (w_hi, w_lo, bias, taps, dilation) = parts, self.convs[index]
        batch, size, width = hi.shape
        more = index + 1 < len(self.convs)
        next_hi, next_lo = self._empty(hi) if more else (None, None)
        bm, bn = (_FRAMES if size * batch >= 4096 else 32), _divisor(width, _CHANNELS)
        wave_conv_kernel[(-(-size // bm), width // bn, batch)](
            hi, lo, w_hi, w_lo, bias, residual, mix, self.alphas[index + 1] if more else None, out, next_hi, next_lo,
            lengths, size, taps, dilation, scale, C=width, RES=residual is not None, MIX=mix is not None,
            OUT=out is not None, NEXT=more, SPLIT=self.split, BM=bm, BN=bn, BK=_divisor(width, _DEPTH),
            num_warps=8 if bm * bn >= 128 * 128 else 4, num_stages=3,
        )  # fmt: skip
        return next_hi, next_lo

    def _empty(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        hi = torch.empty_like(like, dtype=self.dtype)
        return hi, torch.empty_like(hi) if self.split else None


class FusedVocoder:
    """`HiFTVocoder.forward` with fused residual blocks; `lengths` are always given."""

    def __init__(self, vocoder: HiFTVocoder, precision: str = "float32") -> None:
        split = precision == "float32"
        self.vocoder = vocoder
        self.source_blocks = [_Block(block, split) for block in vocoder.source_resblocks]
        self.blocks = [_Block(block, split) for block in vocoder.resblocks]

    def __call__(self, mel: Tensor, draws: SourceDraws, lengths: Tensor, f0: Tensor | None = None) -> Vocoded:
        """As `HiFTVocoder.forward`."""
        return self.vocoder(mel, draws, lengths, f0, trunk=self.trunk)

    def trunk(self, stage: int, x: Tensor, known: Tensor, lengths: Tensor) -> Tensor:
        """The residual blocks of one stage: x and the source's `known` [B, C, L], lengths [B] -> [B, C, L]."""
        x, known, lengths = x.mT.contiguous(), known.mT.contiguous(), lengths.to(torch.int32)
        total = torch.zeros_like(x)
        self.source_blocks[stage](known, lengths, total, mix=x)
        count = len(self.vocoder.config.resblock_kernel_sizes)
        mixed = torch.zeros_like(x)
        for at in range(count):
            block = self.blocks[stage * count + at]
            block(total, lengths, mixed, mix=mixed if at else None, scale=1 / count)
        return mixed.mT.contiguous()


def _divisor(width: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides a width."""
    return min(largest, width & -width)
