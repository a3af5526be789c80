"""What one rank of a fused Step-1 model holds: which rows and columns of which weights, and how many bytes.

From the geometry alone: no weights, no device. `fused_load.py` reads by it and refuses what does not fit before a
byte of weights is read. Under tensor parallelism a rank holds a contiguous block of key/value groups with their
query heads, a block of the feed-forward width and a block of the vocabulary's rows; embedding and norms are whole.

Legend as in `fused.py`. Sizes are decimal, 1 GB = 10^9 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepaudio.lm.geometry import EMBEDDING, HEAD, NORM, Geometry, Shape
from stepaudio.lm.kernels.quantise import GROUP, PRECISIONS, check_precision
from tokenizer.errors import RequestError

GB = 10**9
DENSE = "bfloat16"  # the precision that leaves the weights in the model's dtype, whatever that is
HEAD_PRECISION = {"int4": "int8"}  # logits suffer first, and the head is a small share of the bytes
PROJECTIONS = ("qkv", "out", "gate_up", "down", "head")
RESERVE = 1 * GB  # each GPU keeps this free for the driver, activations and graphs
_WORKING_ROWS, _WORKING_BYTES = 2048, 64  # rows quantised at once, and what each of their weights takes meanwhile


@dataclass(frozen=True)
class Piece:
    """Rows and columns of one stored tensor; a norm has no columns."""

    name: str
    rows: slice
    columns: slice | None
    width: int = 1  # columns of the stored tensor

    @property
    def shape(self) -> Shape:
        rows = self.rows.stop - self.rows.start
        return (rows,) if self.columns is None else (rows, self.columns.stop - self.columns.start)


@dataclass(frozen=True)
class Part:
    """A tensor of `FusedStep1`: pieces on top of each other, then `padding` rows of zeros."""

    field: str  # "qkv", "input_norm" ... as in `FusedLayer` and `FusedStep1`
    pieces: tuple[Piece, ...]
    padding: int = 0

    @property
    def shape(self) -> Shape:
        rows = sum(piece.shape[0] for piece in self.pieces) + self.padding
        return (rows, *self.pieces[0].shape[1:])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def check_split(geometry: Geometry, world: int) -> None:
    """Raises RequestError unless the model splits into `world` equal shares."""
    splits = _splits(geometry)
    if world not in splits:
        raise RequestError(
            f"--tensor-parallel {world} does not divide the model's {geometry.num_attention_groups} key/value groups "
            f"and feed-forward width {geometry.intermediate_size}: use one of {', '.join(map(str, splits))}"
        )


def part_precision(field: str, precision: str) -> str:
    """The precision a part is kept in when the model's is `precision`."""
    if field not in PROJECTIONS:
        return DENSE
    return HEAD_PRECISION.get(precision, precision) if field == "head" else precision


def layer_parts(geometry: Geometry, index: int, rank: int = 0, world: int = 1) -> tuple[Part, ...]:
    """The six tensors of a layer on one rank, in the order of `FusedLayer`."""
    width, prefix = geometry.hidden_size, f"model.layers.{index}"
    heads = _block(geometry.num_attention_heads * geometry.head_dim, rank, world)
    shared = _block(geometry.num_attention_groups * geometry.head_dim, rank, world)
    inner, every = _block(geometry.intermediate_size, rank, world), slice(0, width)

    def norm(name: str) -> Piece:
        return Piece(f"{prefix}.{name}.weight", every, None)

    def matrix(name: str, rows: slice, columns: slice = every, stored: int = width) -> Piece:
        return Piece(f"{prefix}.{name}.weight", rows, columns, stored)

    attention = (
        matrix("self_attn.q_proj", heads),
        matrix("self_attn.k_proj", shared),
        matrix("self_attn.v_proj", shared),
    )
    return (
        Part("input_norm", (norm("input_layernorm"),)),
        Part("qkv", attention),
        Part("out", (matrix("self_attn.o_proj", every, heads),)),
        Part("post_norm", (norm("post_attention_layernorm"),)),
        Part("gate_up", (matrix("mlp.gate_proj", inner), matrix("mlp.up_proj", inner))),
        Part("down", (matrix("mlp.down_proj", every, inner, geometry.intermediate_size),)),
    )


def outer_parts(geometry: Geometry, rank: int = 0, world: int = 1) -> tuple[Part, Part, Part]:
    """Embedding, last norm and head; each rank's head has equally many rows, filled up with zeros."""
    rows, width = geometry.vocab_size, geometry.hidden_size
    every = slice(0, width)
    share = -(-rows // world)
    block = slice(min(rank * share, rows), min((rank + 1) * share, rows))
    return (
        Part("embed", (Piece(f"{EMBEDDING}.weight", slice(0, rows), every, width),)),
        Part("norm", (Piece(f"{NORM}.weight", every, None),)),
        Part("head", (Piece(f"{HEAD}.weight", block, every, width),), padding=share - (block.stop - block.start)),
    )


def _block(size: int, rank: int, world: int) -> slice:
    assert size % world == 0 and 0 <= rank < world, f"{size} does not split, rank {rank} of {world}"
    return slice(rank * (size // world), (rank + 1) * (size // world))


@dataclass(frozen=True)
class RankPlan:
    """The memory of one GPU of `world`; all of them hold as much."""

    precision: str
    world: int
    weight_bytes: int
    working_bytes: int  # taken for a moment while the largest projection is quantised, or dense for a prefill
    cache_bytes: int  # key/value cache per token

    def needs(self, tokens: int) -> int:
        """Bytes a GPU must have free for the model and a cache of so many tokens."""
        return self.weight_bytes + self.working_bytes + tokens * self.cache_bytes + RESERVE

    def room(self, free: int) -> int:
        """Tokens of cache that fit beside the weights."""
        return max(0, (free - self.needs(0)) // self.cache_bytes)


def plan_rank(geometry: Geometry, precision: str = DENSE, itemsize: int = 2, world: int = 1) -> RankPlan:
    """The plan for weights in `precision` and a dtype of `itemsize` bytes. RequestError for what cannot be split."""
    check_precision(precision)
    check_split(geometry, world)
    layer = layer_parts(geometry, 0, 0, world)
    outer = outer_parts(geometry, 0, world)

    def size(part: Part) -> int:
        return _bytes(part.elements, part.shape[0], part_precision(part.field, precision), itemsize)

    quantised = [part for part in (*layer, *outer) if part_precision(part.field, precision) != DENSE]
    return RankPlan(
        precision,
        world,
        weight_bytes=geometry.num_hidden_layers * sum(map(size, layer)) + sum(map(size, outer)),
        working_bytes=max((_working(part, itemsize) for part in quantised), default=0),
        cache_bytes=geometry.cache_bytes(itemsize) // world,
    )


def _working(part: Part, itemsize: int) -> int:
    """The dense weight, a second copy of the result, and float32 and integers of some rows."""
    return part.elements * (itemsize + 1) + _WORKING_BYTES * _WORKING_ROWS * part.shape[1]


def _bytes(elements: int, rows: int, precision: str, itemsize: int) -> int:
    if precision == DENSE:
        return elements * itemsize
    if precision == "int4":
        return elements // 2 + 4 * -(-elements // GROUP)
    return elements + 4 * rows


def check_fits(geometry: Geometry, plan: RankPlan, free: int, itemsize: int = 2, tokens: int = 1024) -> None:
    """Raises RequestError with what would fit instead, unless the model and `tokens` of cache fit in `free` bytes."""
    if plan.needs(tokens) <= free:
        return
    ways = [*_fewer_bits(plan), *_more_gpus(geometry, plan.precision, plan), *_more_gpus(geometry, "int4", plan)]
    found: dict[tuple[bool, bool], str] = {}  # the first that fits with another precision, split, or both
    for precision, world in ways:
        other = plan_rank(geometry, precision, itemsize, world)
        kind = (precision != plan.precision, world != plan.world)
        if other.needs(tokens) <= free and kind not in found:
            words = [f"--precision {precision}"] * kind[0] + [f"--tensor-parallel {world}"] * kind[1]
            found[kind] = f"{' '.join(words)} ({other.weight_bytes / GB:.1f} GB)"
    answer = " or ".join(list(found.values())[:2])
    raise RequestError(
        f"{plan.precision} weights on {_gpus(plan.world)} take {plan.weight_bytes / GB:.1f} GB each, "
        f"{plan.needs(tokens) / GB:.1f} with room to work, but {free / GB:.1f} GB are free: "
        + (f"use {answer}" if answer else "no precision or split of this model fits GPUs of that size")
    )


def _fewer_bits(plan: RankPlan) -> list[tuple[str, int]]:
    return [(precision, plan.world) for precision in PRECISIONS[PRECISIONS.index(plan.precision) + 1 :]]


def _more_gpus(geometry: Geometry, precision: str, plan: RankPlan) -> list[tuple[str, int]]:
    return [(precision, world) for world in _splits(geometry) if world > plan.world]


def _splits(geometry: Geometry) -> list[int]:
    """Into how many ranks the model can be split."""
    groups, inner = geometry.num_attention_groups, geometry.intermediate_size
    return [world for world in range(1, groups + 1) if groups % world == 0 and inner % world == 0]


def describe(plan: RankPlan, name: str, free: int | None = None) -> str:
    """One line for people, before the weights are read."""
    line = f"{name}: {plan.precision} on {_gpus(plan.world)}, {plan.weight_bytes / GB:.2f} GB of weights on each"
    line += f", {plan.cache_bytes:,} bytes of KV cache per token"
    return line if free is None else f"{line}; {free / GB:.1f} GB free: room for {plan.room(free):,} tokens"


def _gpus(world: int) -> str:
    return "1 GPU" if world == 1 else f"{world} GPUs"
