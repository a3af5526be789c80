"""Step-1 without transformers: fused projections, a static cache, and two functions that run it.

`prefill` takes new tokens of some rows, `decode` one token of every row. Shapes are fixed by their arguments and
nothing waits for the device, so both can be captured as CUDA graphs; on the CPU they run as they are. Knows nothing
about sampling, requests or files. The eager model (`modeling.py`) is their oracle.

Legend: B rows, R new tokens of a prefill, W hidden width, H query heads and G key/value groups of this rank, D head
width, V vocabulary, K and N a projection's in and out features. Source: formats.md 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio.lm.attend import Attend, decode_attention, prefill_attention
from stepaudio.lm.attention import alibi_slopes
from stepaudio.lm.cache import StaticCache
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.kernels.linear import Norm, linear
from stepaudio.lm.kernels.quantise import Packed
from stepaudio.lm.kernels.workspace import Workspace
from stepaudio.lm.modeling import ALIBI_DTYPES, Step1ForCausalLM


class Projection(Protocol):
    """A linear map without bias, of whatever precision."""

    packed: Packed

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one call reads."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        ...


class DenseLinear:
    """A projection by a plain weight [N, K]."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = Packed("bfloat16", weight.detach(), None, weight.shape[1])

    @property
    def weight(self) -> Tensor:
        return self.packed.data

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.packed)


@dataclass
class FusedLayer:
    """One layer; the rows of `qkv` are q, k, v, those of `gate_up` gate, up (under tensor parallelism, this rank's)."""

    input_norm: Tensor  # [W]
    qkv: Projection  # W -> (H + 2 G) D
    out: Projection  # H D -> W
    post_norm: Tensor  # [W]
    gate_up: Projection  # W -> 2 F
    down: Projection  # F -> W

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class FusedStep1:
    """The weights of one rank and what the functions below need to know about them."""

    geometry: Geometry  # of the whole model
    embed: Tensor  # [V, W]
    layers: list[FusedLayer]
    norm: Tensor  # [W]
    head: Projection  # W -> V, or this rank's share of V
    heads: int  # H
    groups: int  # G
    slopes: Tensor  # float32 [H]
    alibi_dtype: torch.dtype = torch.float32
    eps: float = 1e-5  # rms_norm_eps of config.json
    reduce: Callable[[Tensor], Tensor] | None = None  # sum over the ranks, after `out` and `down`
    gather: Callable[[Tensor], Tensor] | None = None  # logits of all ranks side by side
    workspace: Workspace | None = None  # of the kernels; models that run at the same time need one each

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states and the cache."""
        return self.embed.dtype

    @property
    def scaling(self) -> float:
        return self.geometry.head_dim**-0.5

    @property
    def bytes_per_token(self) -> int:
        """Weights that one step of any batch reads: every projection, one row of the embedding left out."""
        layers = sum(part.nbytes for layer in self.layers for part in layer.projections)
        return layers + self.head.nbytes

    @classmethod
    def from_model(cls, model: Step1ForCausalLM) -> FusedStep1:
        """Takes the weights out of an eager model that lies whole on one device; the model is of no use afterwards.

        Layer by layer, so that no more than one layer exists twice.
        """
        config, inner = model.config, model.model
        geometry = Geometry.from_config(config.to_dict())
        fused = cls(
            geometry=geometry,
            embed=inner.embed_tokens.weight.detach(),
            layers=[_fuse(layer) for layer in inner.layers],
            norm=inner.norm.weight.detach(),
            head=DenseLinear(model.lm_head.weight),
            heads=geometry.num_attention_heads,
            groups=geometry.num_attention_groups,
            slopes=alibi_slopes(geometry.num_attention_heads, inner.embed_tokens.weight.device),
            alibi_dtype=ALIBI_DTYPES[config.alibi_dtype],
            eps=float(config.rms_norm_eps),
        )
        return fused

    def new_cache(self, rows: int, capacity: int) -> StaticCache:
        """An empty cache for so many rows of so many tokens."""
        return StaticCache(
            len(self.layers), rows, self.groups, capacity, self.geometry.head_dim, self.device, self.dtype
        )


def _fuse(layer: nn.Module) -> FusedLayer:
    """A decoder layer's weights; its own modules lose theirs, so that memory does not double."""
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=DenseLinear(attention.o_proj.weight),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=DenseLinear(mlp.down_proj.weight),
    )


def _joined(*parts: nn.Linear) -> DenseLinear:
    joined = DenseLinear(torch.cat([part.weight.detach() for part in parts]))
    for part in parts:
        part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)
    return joined


def decode(model: FusedStep1, ids: Tensor, cache: StaticCache, max_length: int) -> Tensor:
    """One more token of each of the first B rows: ids int64 [B] -> logits [B, V].

    Keys and values go to index `cache.lengths[b]`, which then counts one more. `max_length` bounds the keys of any
    row, the new one included; it may be the capacity.
    """
    lengths = cache.lengths[: ids.shape[0]]
    lengths += 1
    attend = decode_attention(model.embed, cache, lengths, model.slopes, model.scaling, max_length, model.workspace)
    return _logits(model, _layers(model, F.embedding(ids, model.embed), attend))


def prefill(
    model: FusedStep1, ids: Tensor, cache: StaticCache, slots: Tensor, lengths: Tensor, start: int = 0, slot: int = 0
) -> Tensor:
    """New tokens of n rows: ids int64 [n, R], filled up on the right, of which `lengths` int32 [n] count -> [n, V].

    The logits are those after each row's last token. `slots` int64 [n] are the rows' places in the cache. A later
    piece of a prompt begins at `start` > 0, for one row alone whose place is `slot` too.
    """
    count, rows = ids.shape
    attend = prefill_attention(model.embed, cache, slots, lengths, model.slopes, model.scaling, rows, start, slot)
    hidden = _layers(model, F.embedding(ids.flatten(), model.embed), attend)
    cache.lengths[slots] = lengths + start
    last = torch.arange(count, device=ids.device) * rows + lengths.long() - 1
    return _logits(model, hidden[last])


def _layers(model: FusedStep1, hidden: Tensor, attend: Attend) -> Tensor:
    """All layers over T tokens: [T, W] -> [T, W]."""
    width, head = model.heads * model.geometry.head_dim, model.geometry.head_dim
    for index, layer in enumerate(model.layers):
        qkv = linear(hidden, layer.qkv.packed, Norm(layer.input_norm, model.eps), workspace=model.workspace)
        mixed = attend(index, qkv[:, :width].unflatten(1, (-1, head)), qkv[:, width:]).flatten(1)
        hidden = _added(model, layer.out, mixed, hidden)
        norm = Norm(layer.post_norm, model.eps)
        inner = linear(hidden, layer.gate_up.packed, norm, silu=True, workspace=model.workspace)
        hidden = _added(model, layer.down, inner, hidden)
    return hidden


def _added(model: FusedStep1, projection: Projection, x: Tensor, residual: Tensor) -> Tensor:
    """residual + projection(x), the latter summed over the ranks."""
    if model.reduce is None:
        return linear(x, projection.packed, residual=residual, workspace=model.workspace)
    return residual + model.reduce(linear(x, projection.packed, workspace=model.workspace))


def _logits(model: FusedStep1, hidden: Tensor) -> Tensor:
    """[T, W] -> [T, V]; what the ranks' shares are filled up with is cut off."""
    logits = linear(hidden, model.head.packed, Norm(model.norm, model.eps), workspace=model.workspace)
    return (model.gather(logits) if model.gather else logits)[:, : model.geometry.vocab_size]
