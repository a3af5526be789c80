"""Linear maps for few rows: dense or quantised weights, with what stands before and after them in the same launch.

One row takes a matrix-vector kernel, 2 to 64 rows a tensor-core tile kernel, more rows (a prefill) the dense weights
and torch's own product. Everywhere else, and as the oracle, `linear_plain` runs. Every launch can be captured in a
CUDA graph once it has run outside one.

Legend: B rows, K in features, N out features, F inner width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.lm.kernels.available import launch, takes
from stepaudio.lm.kernels.pointwise import rms_norm, rms_norm_plain, silu_mul, silu_mul_plain
from stepaudio.lm.kernels.quantise import WORD_BITS, Packed, pack, run_length, unpack
from stepaudio.lm.kernels.tiles import gemv_tile, skinny_tile
from stepaudio.lm.kernels.workspace import Workspace, shared_workspace

SKINNY_ROWS = 64  # more rows go through dense weights
DENSE_SKINNY_ROWS = 8  # unquantised weights leave it to torch earlier
NORM_INSIDE = ("bfloat16",)  # every block norms x again: too many instructions per byte for smaller weights


class Norm(NamedTuple):
    """RMS norm of a layer's input."""

    weight: Tensor  # [K]
    eps: float


class QuantLinear:
    """A projection [..., K] -> [..., N] whose weight is stored in few bits. `weight` is [N, K]."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one call reads."""
        return self.packed.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [N, K] this projection stands for: its oracle is a plain product with them."""
        return unpack(self.packed, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.packed)


def quantise(weight: Tensor, mode: str) -> QuantLinear:
    """Quantises [N, K] where it lies; RequestError for a mode that is not in PRECISIONS."""
    return QuantLinear(pack(weight, mode))


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """[..., K] by a plain weight [N, K] -> [..., N]; the kernels for up to 8 rows, torch for more."""
    return linear(x, Packed("bfloat16", weight, None, weight.shape[1]))


def linear_plain(
    x: Tensor, packed: Packed, norm: Norm | None = None, residual: Tensor | None = None, silu: bool = False
) -> Tensor:
    """The oracle of `linear`: dequantised weights in the dtype of x, torch's product, roundings as in the model."""
    if norm is not None:
        x = rms_norm_plain(x, norm.weight, norm.eps)
    out = F.linear(x, unpack(packed, x.dtype))
    if silu:
        out = silu_mul_plain(out)
    return out if residual is None else residual + out


def linear(
    x: Tensor,
    packed: Packed,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """residual + f(norm(x) by weight): [..., K] -> [..., N].

    norm: RMS norm of x first. silu: rows of the weight are gate, then up; the result is silu(gate) * up [..., N / 2].
    residual [..., N]: added to the rounded product. workspace: needed by callers that launch on several streams.
    """
    if not takes(x, packed.precision):
        return linear_plain(x, packed, norm, residual, silu)
    rows = x.numel() // x.shape[-1]
    if norm is not None and (rows > 1 or packed.precision not in NORM_INSIDE):
        x, norm = rms_norm(x, norm.weight, norm.eps), None
    if rows == 1:
        return _gemv(x, packed, norm, residual, silu)
    kernel_residual = None if silu else residual
    if 1 < rows <= (DENSE_SKINNY_ROWS if packed.scale is None else SKINNY_ROWS):
        out = _skinny(x, packed, kernel_residual, workspace)
    else:
        out = F.linear(x, dense_weight(packed, x.dtype))
        if kernel_residual is not None:
            out = kernel_residual + out
    if silu:
        out = silu_mul(out)
        return out if residual is None else residual + out
    return out


def _gemv(x: Tensor, packed: Packed, norm: Norm | None, residual: Tensor | None, silu: bool) -> Tensor:
    from stepaudio.lm.kernels import gemv_triton

    assert x.shape[-1] == packed.columns, f"x {tuple(x.shape)} by a weight with {packed.columns} columns"
    x, columns = x.contiguous(), packed.rows // 2 if silu else packed.rows
    tile = gemv_tile(packed, silu)
    out = x.new_empty(*x.shape[:-1], columns)
    if residual is not None:
        residual = residual.contiguous()
    grid = (-(-packed.rows // tile.rows),)
    flags = {"NORM": norm is not None, "RESIDUAL": residual is not None, "PAIR": silu}
    pointers = (x if norm is None else norm.weight, x if residual is None else residual, out)
    eps = 0.0 if norm is None else norm.eps
    common = {"K": packed.columns, "BN": tile.rows, "CHUNKS": tile.chunks, "VEC": tile.vector, "num_warps": tile.warps}
    options = {**common, **flags}
    data = _plain_bytes(packed)
    scale = x if packed.scale is None else packed.scale
    if packed.precision in WORD_BITS:
        launch(
            gemv_triton.gemv_words,
            grid,
            x.device,
            x,
            data,
            scale,
            *pointers,
            columns,
            data.stride(0),
            scale.stride(0),
            eps,
            BITS=WORD_BITS[packed.precision],
            **options,
        )
    else:
        fp8 = packed.precision == "fp8"
        launch(
            gemv_triton.gemv,
            grid,
            x.device,
            x,
            data,
            scale,
            *pointers,
            columns,
            data.stride(0),
            eps,
            FP8=fp8,
            **options,
        )
    return out


def _skinny(x: Tensor, packed: Packed, residual: Tensor | None, workspace: Workspace | None) -> Tensor:
    from stepaudio.lm.kernels import skinny_triton

    flat = x.reshape(-1, packed.columns).contiguous()
    rows, columns = flat.shape[0], packed.rows
    tile = skinny_tile(packed, rows)
    out = x.new_empty(*x.shape[:-1], columns)
    blocks = -(-columns // tile.columns)
    workspace = workspace or shared_workspace(x.device)
    floats, counters = workspace.take(blocks * tile.split * tile.rows * tile.columns, blocks if tile.split > 1 else 0)
    scale = packed.scale
    launch(
        skinny_triton.skinny,
        (blocks, tile.split),
        x.device,
        flat,
        _plain_bytes(packed),
        flat if scale is None else scale,
        flat if residual is None else residual.contiguous(),
        out,
        floats,
        counters,
        rows,
        columns,
        flat.stride(0),
        packed.data.stride(0),
        0 if scale is None else scale.stride(0),
        K=packed.columns,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.step,
        SPLIT=tile.split,
        BITS=_bits(packed),
        RESIDUAL=residual is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _bits(packed: Packed) -> int:
    """How the kernels are told the form of a weight: bits of a word's field, 16 for plain floats, 0 for fp8."""
    return 16 if packed.scale is None else WORD_BITS.get(packed.precision, 0)


def _plain_bytes(packed: Packed) -> Tensor:
    """fp8 as uint8: a masked load has no fp8 zero to put in."""
    return packed.data.view(torch.uint8) if packed.precision == "fp8" else packed.data


def dense_weight(packed: Packed, dtype: torch.dtype) -> Tensor:
    """[N, K] in the dtype of the activations, made by one kernel; the stored weight itself if it is that already."""
    if packed.scale is None:
        return packed.data if packed.data.dtype == dtype else packed.data.to(dtype)
    if not takes(packed.scale.new_empty(0, dtype=dtype), packed.precision):
        return unpack(packed, dtype)
    from stepaudio.lm.kernels import skinny_triton

    out = packed.scale.new_empty(packed.rows, packed.columns, dtype=dtype)
    bits = _bits(packed)
    block_rows, block_columns = (64, run_length(bits)) if bits else (16, 512)
    grid = (-(-packed.rows // block_rows), -(-packed.columns // block_columns))
    launch(
        skinny_triton.dequantise,
        grid,
        out.device,
        _plain_bytes(packed),
        packed.scale,
        out,
        packed.rows,
        packed.columns,
        packed.data.stride(0),
        packed.scale.stride(0),
        BN=block_rows,
        BK=block_columns,
        BITS=bits,
        num_warps=4,
    )
    return out
