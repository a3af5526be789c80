"""The velocity estimator and its solver as a few large kernels per block, for CUDA.

Same weights and the same arithmetic as `unet.ConditionalDecoder` inside `cfm.ConditionalCFM`, which stay the oracle.
Frames come first and channels last; conditional and unconditional rows run together; what does not change from step
to step (time embeddings, the share of mu, voice and prompt in the first block) is computed once per call or once ever.
Legend: B requests, R = 2 B rows, T mel frames (a bucket, even), C channels, S steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.cfm import ConditionalCFM, time_grid
from cosyvoice.config import EstimatorConfig
from cosyvoice.unet import ResnetBlock1D, TransformerBlock

PROGRAMMATIC_LAUNCH = True  # on Hopper and later, let a kernel start while the one before it ends
_TILES = ((64, 128), (64, 64), (32, 64), (32, 32))  # frames x channels of one program, largest first
_BUSY = 100  # programs that keep a large GPU busy


def unsupported(config: EstimatorConfig, device: torch.device) -> str | None:
    """Why these sizes or this device cannot run here; None if they can."""
    sizes = (*config.channels, config.num_heads * config.attention_head_dim, config.attention_head_dim)
    if any(size & (size - 1) or size < 16 for size in sizes) or min(config.channels) < 32:
        return f"widths {sizes} are not all powers of two"
    if max(config.channels) > 256:
        return f"channels {config.channels} are above 256"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    from cosyvoice.kernels import triton

    return "Triton is not installed" if triton is None else None


def tile(frames: int, rows: int, width: int, largest: tuple[int, int] = _TILES[0]) -> tuple[int, int]:
    """Frames and channels of one program: the largest tile that still gives every part of the GPU something to do."""
    fitting = [(m, n) for m, n in _TILES if n <= width and m <= largest[0] and n <= largest[1]]
    for m, n in fitting:
        if rows * math.ceil(frames / m) * (width // n) >= _BUSY:
            return m, n
    return fitting[-1]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Frames of R rows at one rate: how many there is room for and how many are valid."""

    count: int  # R
    frames: int  # T
    lengths: Tensor  # int32 [R]


@dataclass(frozen=True, eq=False)
class _Parts:
    """A convolution's output and what its GroupNorm needs: x [R, T, C], means and squares [R, tiles, groups, 2]."""

    x: Tensor
    stats: Tensor
    tile: int  # frames of one part


class _Conv:
    """Packed weights [sources, outputs, taps, inputs] of a convolution."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sources: int = 1) -> None:
        parts = weight.chunk(sources, dim=1)
        self.weight = torch.stack([part.transpose(1, 2) for part in parts]).contiguous()
        self.bias, self.two = bias, sources == 2
        _, self.width, self.taps, self.inputs = self.weight.shape


def _upsampling(weight: Tensor, bias: Tensor) -> _Conv:
    """ConvTranspose1d [in, out, 4] as two convolutions of two taps, for even and odd frames."""
    taps = [[weight[:, :, 1 - parity + 2 * tap].T for tap in (0, 1)] for parity in (0, 1)]  # [out, in] each
    conv = _Conv(torch.cat([torch.stack(pair, dim=2) for pair in taps]), bias)
    conv.width //= 2
    return conv


class _Resnet:
    def __init__(self, block: ResnetBlock1D, sources: int) -> None:
        conv1, self.norm1, _ = block.block1.block
        conv2, self.norm2, _ = block.block2.block
        self.conv1, self.conv2 = _Conv(conv1.weight, conv1.bias, sources), _Conv(conv2.weight, conv2.bias)
        self.shortcut = _Conv(block.res_conv.weight, block.res_conv.bias, sources)
        self.mlp = block.mlp


class _Transformer:
    def __init__(self, block: TransformerBlock) -> None:
        attention = block.attn1
        self.qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        self.heads, self.head_dim = attention.heads, len(self.qkv) // 3 // attention.heads
        self.out, self.norm1, self.norm3 = attention.to_out[0], block.norm1, block.norm3
        self.up, self.down = block.ff.net[0].proj, block.ff.net[2]


class FusedSolver:
    """Runs on the weights of a `ConditionalCFM`; copies are made of the convolutions and of q, k, v."""

    def __init__(self, cfm: ConditionalCFM) -> None:
        net = cfm.estimator
        self.guidance, self.time_mlp = cfm.guidance, net.time_mlp
        stages = [*net.down_blocks, *net.mid_blocks, *net.up_blocks]
        last = len(stages) - 2
        self.resnets = [_Resnet(stage[0], 2 if i >= last else 1) for i, stage in enumerate(stages)]
        self.blocks = [[_Transformer(block) for block in stage[1]] for stage in stages]
        mels = net.final_proj.weight.shape[0]
        first = stages[0][0]
        self.mels = mels
        self.entry = [(conv.weight[:, mels:], conv.bias) for conv in (first.block1.block[0], first.res_conv)]
        self.resnets[0].conv1 = _Conv(first.block1.block[0].weight[:, :mels], None)
        self.resnets[0].shortcut = _Conv(first.res_conv.weight[:, :mels], None)
        self.down, self.down_conv = (_Conv(conv.weight, conv.bias) for conv in (stages[0][2].conv, stages[1][2]))
        self.up = _upsampling(stages[-2][2].conv.weight, stages[-2][2].conv.bias)
        self.up_conv = _Conv(stages[-1][2].weight, stages[-1][2].bias)
        final, self.final_norm, _ = net.final_block.block
        self.final, self.proj = _Conv(final.weight, final.bias), net.final_proj
        self.weight = final.weight
        self.pdl = PROGRAMMATIC_LAUNCH and _is_hopper(final.weight.device)
        self._times: dict[int, tuple[list[float], Tensor]] = {}

    def times(self, num_steps: int) -> tuple[list[float], Tensor]:
        """Widths of the steps, and what each ResNet block adds in each step: [S, blocks, C]. Computed once."""
        if num_steps not in self._times:
            times, widths = time_grid(num_steps, self.weight.dtype)
            embedding = self.time_mlp(times.to(self.weight.device))
            added = torch.stack([_padded(resnet.mlp(embedding)) for resnet in self.resnets], dim=1)
            self._times[num_steps] = (widths.tolist(), added.contiguous())
        return self._times[num_steps]

    def __call__(
        self, noise: Tensor, lengths: Tensor, mu: Tensor, spks: Tensor, cond: Tensor, num_steps: int
    ) -> Tensor:
        """Mel [B, 80, T]; noise, mu, cond [B, 80, T], spks [B, 80], lengths [B]. What lies past a length is noise."""
        widths, added = self.times(num_steps)
        batch, _, frames = noise.shape
        assert frames % 2 == 0, frames
        double = lengths.to(torch.int32).repeat(2)
        full = _Rows(2 * batch, frames, double)
        half = _Rows(2 * batch, frames // 2, (double + 1) // 2)
        x = noise.transpose(1, 2).contiguous()
        entry = [self._enter(weight, bias, lengths, mu, spks, cond) for weight, bias in self.entry]
        for width, times in zip(widths, added):
            self._step(x, entry, times, width, full, half)
        return x.transpose(1, 2)

    def _enter(self, weight: Tensor, bias: Tensor, lengths: Tensor, mu: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        """The share of mu, voice and prompt in a convolution of the first block, [R, T, C]."""
        mask = torch.arange(mu.shape[-1], device=mu.device) < lengths[:, None]
        known = torch.cat([mu, spks[:, :, None].expand_as(mu), cond], dim=1) * mask[:, None].to(mu.dtype)
        given = F.conv1d(known, weight, bias, padding=weight.shape[-1] // 2).transpose(1, 2)
        return torch.cat([given, bias.expand_as(given)])

    def _step(self, x: Tensor, entry: list[Tensor], times: Tensor, width: float, full: _Rows, half: _Rows) -> None:
        skip = self._stage(0, x, None, times, full, entry)
        down = self._conv(self.down, skip, half, full, stride=2)
        half_skip = self._stage(1, down, None, times, half)
        y = self._conv(self.down_conv, half_skip, half, half)
        count = len(self.resnets)
        for index in range(2, count - 2):
            y = self._stage(index, y, None, times, half)
        y = self._stage(count - 2, y, half_skip, times, half)
        y = self._conv(self.up, y, full, half, up=True)
        y = self._stage(count - 1, y, skip, times, full)
        y = self._conv(self.up_conv, y, full, full)
        self._euler(self._conv(self.final, y, full, full, stats=True), x, width, full)

    def _stage(
        self, index: int, x: Tensor, x2: Tensor | None, times: Tensor, rows: _Rows, entry: list[Tensor] | None = None
    ) -> Tensor:
        resnet = self.resnets[index]
        extra, shortcut = (None, None) if entry is None else entry
        hidden = self._conv(resnet.conv1, x, rows, rows, x2=x2, extra=extra, stats=True)
        hidden = self._conv(resnet.conv2, hidden, rows, rows, norm=resnet.norm1, time=times[index], stats=True)
        x = self._merge(resnet, hidden, x, x2, shortcut, rows)
        for block in self.blocks[index]:
            x = self._transform(block, x, rows)
        return x

    def _transform(self, block: _Transformer, x: Tensor, rows: _Rows) -> Tensor:
        qkv = self._linear(x, block.qkv, None, rows, norm=block.norm1)
        x = self._linear(self._attend(block, qkv, rows), block.out.weight, block.out.bias, rows, residual=x)
        hidden = self._linear(x, block.up.weight, block.up.bias, rows, norm=block.norm3, gelu=True)
        return self._linear(hidden, block.down.weight, block.down.bias, rows, residual=x)

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: _Rows,
        norm: nn.LayerNorm | None = None,
        gelu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        from cosyvoice.kernels import linear_kernel

        width, inputs = weight.shape
        out = x.new_empty(rows.count, rows.frames, width)
        m, n = tile(rows.frames, rows.count, width)
        step = min(inputs, 256 if m * n <= 2048 else 128 if m * n <= 4096 else 64)
        linear_kernel[(-(-rows.frames // m), width // n, rows.count)](
            x, weight, bias, out, residual, None if norm is None else norm.weight,
            None if norm is None else norm.bias, rows.lengths, rows.frames, K=inputs, N=width, BM=m, BN=n, BK=step,
            LN=norm is not None, GELU=gelu, BIAS=bias is not None, RES=residual is not None, PDL=self.pdl,
            num_warps=8 if m * n >= 8192 or (norm is not None and m >= 64) else 4, num_stages=4, **self._launch(),
        )  # fmt: skip
        return out

    def _attend(self, block: _Transformer, qkv: Tensor, rows: _Rows) -> Tensor:
        from cosyvoice.kernels import attention_kernel

        heads, size = block.heads, block.head_dim
        out = qkv.new_empty(rows.count, rows.frames, heads * size)
        wide = rows.count * heads * rows.frames >= 128 * 264
        m = 128 if wide else 64 if rows.count * heads * rows.frames >= 64 * _BUSY else 32
        attention_kernel[(-(-rows.frames // m), heads, rows.count)](
            qkv, out, rows.lengths, rows.frames, math.log2(math.e) / math.sqrt(size), H=heads, D=size, BM=m, BN=64,
            PDL=self.pdl, num_warps=8 if wide else 4, num_stages=3, **self._launch(),
        )  # fmt: skip
        return out

    def _conv(
        self,
        conv: _Conv,
        x: Tensor | _Parts,
        rows: _Rows,
        before: _Rows,
        x2: Tensor | None = None,
        extra: Tensor | None = None,
        norm: nn.GroupNorm | None = None,
        time: Tensor | None = None,
        stride: int = 1,
        up: bool = False,
        stats: bool = False,
    ) -> Tensor | _Parts:
        """`rows` are those of the output, `before` those of the input."""
        from cosyvoice.kernels import GROUPS, conv_kernel

        source = x.x if isinstance(x, _Parts) else x
        given = x if isinstance(x, _Parts) else _Parts(source, source, 1)
        out = source.new_empty(rows.count, rows.frames, conv.width)
        frames = rows.frames // 2 if up else rows.frames
        # a tile and its weights take all inputs at once: beyond 256 of them shared memory holds half the frames
        largest = (64, 64) if _power(conv.inputs) <= 256 else (32, 64)
        m, n = tile(frames, rows.count, conv.width * (2 if up else 1), largest)
        made = -(-frames // m)
        parts = _tiles(rows.frames, m)
        new = source.new_empty(rows.count, parts, GROUPS, 2, dtype=torch.float32) if stats else out
        gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        conv_kernel[(made, conv.width * (2 if up else 1) // n, rows.count)](
            source, x2, conv.weight, conv.bias, extra, time, gain, shift, given.stats, out, new, rows.lengths,
            before.lengths, frames, before.frames, rows.frames, len(source), K=conv.inputs, KP=_power(conv.inputs),
            N=conv.width, TAPS=conv.taps, STRIDE=stride, UP=up, TWO=conv.two, EXTRA=extra is not None,
            NORM=norm is not None, STATS=stats, G=GROUPS, BS=given.tile if norm else 1,
            NT_IN=_tiles(before.frames, given.tile) if norm else 1, NT_OUT=parts if stats else 1, BM=m, BN=n,
            PDL=self.pdl, num_warps=8 if m >= 64 or norm else 4,
            num_stages=1, **self._launch(),
        )  # fmt: skip
        return _Parts(out, new, m) if stats else out

    def _merge(
        self, resnet: _Resnet, hidden: _Parts, x: Tensor, x2: Tensor | None, extra: Tensor | None, rows: _Rows
    ) -> Tensor:
        from cosyvoice.kernels import GROUPS, merge_kernel

        conv, out = resnet.shortcut, torch.empty_like(hidden.x)
        m, n = tile(rows.frames, rows.count, conv.width, (64, 64))
        merge_kernel[(-(-rows.frames // m), conv.width // n, rows.count)](
            hidden.x, hidden.stats, resnet.norm2.weight, resnet.norm2.bias, x, x2, conv.weight, conv.bias, extra, out,
            rows.lengths, rows.frames, len(x), K=conv.inputs, KP=_power(conv.inputs), N=conv.width, TWO=conv.two,
            EXTRA=extra is not None, G=GROUPS, BS=hidden.tile, NT=_tiles(rows.frames, hidden.tile), BM=m, BN=n,
            PDL=self.pdl, num_warps=8 if m >= 64 else 4, **self._launch(),
        )  # fmt: skip
        return out

    def _euler(self, hidden: _Parts, x: Tensor, width: float, rows: _Rows) -> None:
        from cosyvoice.kernels import GROUPS, euler_kernel

        norm, batch = self.final_norm, rows.count // 2
        m = 16 if batch * rows.frames <= 16 * 264 else 32
        euler_kernel[(-(-rows.frames // m), batch)](
            hidden.x, hidden.stats, norm.weight, norm.bias, self.proj.weight, self.proj.bias, x, rows.lengths,
            rows.frames, batch, width, self.guidance, C=hidden.x.shape[-1], N=self.mels, BN=_power(self.mels),
            BK=min(64, hidden.x.shape[-1]), G=GROUPS, BS=hidden.tile, NT=_tiles(rows.frames, hidden.tile), BM=m,
            PDL=self.pdl, num_warps=8, **self._launch(),
        )  # fmt: skip

    def _launch(self) -> dict[str, bool]:
        return {"launch_pdl": True} if self.pdl else {}


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _tiles(frames: int, tile_frames: int) -> int:
    """Room for the parts of a GroupNorm: a power of two, so that few kernels serve all lengths."""
    return max(16, 1 << (-(-frames // tile_frames) - 1).bit_length())


def _padded(value: Tensor) -> Tensor:
    """[S, C] -> [S, 256], so that the blocks' values form one tensor."""
    return F.pad(value, (0, 256 - value.shape[1]))
