"""Where the layers of a Step-1 model would go, and how many tokens of key/value cache fit beside them.

From config.json alone: no weights, no GPU, no torch. Sizes are decimal, 1 GB = 10^9 bytes.

    python -m stepaudio.lm.plan --model-path ROOT/Step-Audio-Chat --gpus 4x80
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepaudio.lm.geometry import EMBEDDING, HEAD, NORM, Geometry, read_config
from tokenizer.errors import RequestError, run

GB = 10**9
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_GPUS, MAX_GIGABYTES = 1024, 10_000
_RESERVE = 2.0  # GB each GPU keeps for the driver, activations and one chunk of position bias


@dataclass(frozen=True)
class Part:
    """A piece of the model that stays on one device."""

    name: str
    weight_bytes: int
    cache_bytes: int  # per token


@dataclass(frozen=True)
class Gpu:
    """What one GPU would hold."""

    capacity: int  # bytes
    parts: tuple[Part, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.parts)

    @property
    def cache_bytes(self) -> int:
        """Key/value cache per token."""
        return sum(part.cache_bytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """A placement and what it leaves."""

    geometry: Geometry
    dtype: str
    context: int  # tokens of cache asked for
    reserve: int  # bytes kept free on each GPU
    gpus: tuple[Gpu, ...]
    left_over: tuple[Part, ...]  # parts that found no GPU
    room: int  # tokens of cache that fit; 0 when the weights do not

    @property
    def fits(self) -> bool:
        return not self.left_over and self.room >= self.context

    @property
    def weight_bytes(self) -> int:
        return self.geometry.parameters * DTYPE_BYTES[self.dtype]

    @property
    def cache_bytes(self) -> int:
        """Key/value cache per token, all layers."""
        return self.geometry.cache_bytes(DTYPE_BYTES[self.dtype])

    @property
    def device_map(self) -> dict[str, int | str]:
        """For `from_pretrained`: module -> GPU; what found none stays on the CPU."""
        placed: dict[str, int | str] = {part.name: n for n, gpu in enumerate(self.gpus) for part in gpu.parts}
        return placed | {part.name: "cpu" for part in self.left_over}


def make_plan(
    geometry: Geometry, capacities: Sequence[int], dtype: str = "bf16", context: int = 8192, reserve: int = 2 * GB
) -> Plan:
    """Places the model on GPUs of the given bytes, in running order, so that the most tokens fit.

    Raises RequestError for an unknown dtype, or a context beyond what the model was trained for.
    """
    if dtype not in DTYPE_BYTES:
        raise RequestError(f"--dtype {dtype!r} must be one of {', '.join(DTYPE_BYTES)}")
    if not 1 <= context <= geometry.max_seq_len:
        raise RequestError(f"--context {context} is outside 1 to {geometry.max_seq_len} tokens")
    parts = _parts(geometry, DTYPE_BYTES[dtype])
    usable = [max(0, capacity - reserve) for capacity in capacities]
    room = _most_tokens(parts, usable)
    groups, left_over = _fill(parts, usable, room)
    gpus = tuple(Gpu(capacity, tuple(group)) for capacity, group in zip(capacities, groups))
    return Plan(geometry, dtype, context, reserve, gpus, tuple(left_over), 0 if left_over else room)


def _parts(geometry: Geometry, width: int) -> list[Part]:
    parts = []
    for name, shapes in geometry.parts().items():
        cache = 0 if name in (EMBEDDING, NORM, HEAD) else geometry.layer_cache_bytes(width)
        parts.append(Part(name, width * sum(math.prod(shape) for shape in shapes.values()), cache))
    return parts


def _fill(parts: Sequence[Part], usable: Sequence[int], tokens: int) -> tuple[list[list[Part]], list[Part]]:
    """First fit in running order, each part with its cache for `tokens`; then what is left over."""
    groups: list[list[Part]] = []
    rest = list(parts)
    for free in usable:
        group: list[Part] = []
        while rest and (needed := rest[0].weight_bytes + tokens * rest[0].cache_bytes) <= free:
            free -= needed
            group.append(rest.pop(0))
        groups.append(group)
    return groups, rest


def _most_tokens(parts: Sequence[Part], usable: Sequence[int]) -> int:
    """The largest number of tokens for which every part finds a place; 0 if there is none."""
    low, high = 0, sum(usable) // sum(part.cache_bytes for part in parts) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fill(parts, usable, middle)[1] else (middle, high)
    return low


def parse_gpus(text: str) -> list[int]:
    """ "4x80" or "2x80,1x48" (number x GB) -> bytes of each GPU; RequestError for anything else."""
    capacities: list[int] = []
    for term in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,5}(?:\.\d+)?)\s*", term)
        if not match or not 1 <= int(match[1]) <= MAX_GPUS or not 1 <= float(match[2]) <= MAX_GIGABYTES:
            raise RequestError(
                f"--gpus {text!r} is not understood: write NUMBERxGB, e.g. 4x80 or 2x80,1x48 "
                f"(1 to {MAX_GPUS} GPUs of 1 to {MAX_GIGABYTES:,} GB)"
            )
        capacities += [int(float(match[2]) * GB)] * int(match[1])
    return capacities


def describe_parts(parts: Sequence[Part]) -> str:
    """ "embedding, layers 0-21": the parts of one device, read by a person."""
    names = {EMBEDDING: "embedding", NORM: "norm", HEAD: "lm_head"}
    layers = [int(part.name.rpartition(".")[2]) for part in parts if part.name not in names]
    words = [names[part.name] for part in parts if part.name in names]
    if layers:
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        words.insert(1 if words[:1] == ["embedding"] else 0, span)
    return ", ".join(words) or "nothing"


def render(plan: Plan, name: str) -> str:
    """The plan as a table."""
    geometry = plan.geometry
    lines = [
        f"{name}: {geometry.num_hidden_layers} layers, {geometry.parameters:,} parameters; {plan.dtype}: "
        f"{plan.weight_bytes / GB:.1f} GB of weights, {plan.cache_bytes:,} bytes of KV cache per token",
        f"{'GPU':>4}{'size GB':>9}{'weights':>9}{'cache':>7}{'free':>8}  holds ({plan.context:,} tokens cached)",
    ]
    for number, gpu in enumerate(plan.gpus):
        cache = plan.context * gpu.cache_bytes
        free = gpu.capacity - gpu.weight_bytes - cache
        lines.append(
            f"{number:>4}{gpu.capacity / GB:>9.1f}{gpu.weight_bytes / GB:>9.1f}{cache / GB:>7.1f}{free / GB:>8.1f}  "
            + describe_parts(gpu.parts)
        )
    return "\n".join([*lines, _verdict(plan)])


def _verdict(plan: Plan) -> str:
    kept = f"{plan.reserve / GB:g} GB kept free on each GPU"
    if plan.left_over:
        missing = sum(part.weight_bytes for part in plan.left_over)
        return (
            f"does not fit ({kept}): no place for {describe_parts(plan.left_over)}, {missing / GB:.1f} GB\n"
            "add GPUs, quantise the weights, or leave these parts on the CPU (slow)"
        )
    room = f"room for {plan.room:,} tokens of KV cache ({kept})"
    return f"fits: {room}" if plan.fits else f"does not fit: {room}, {plan.context:,} asked for; lower --context"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything the table says, exact, and the device map."""
    return {
        "dtype": plan.dtype,
        "parameters": plan.geometry.parameters,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.cache_bytes,
        "context": plan.context,
        "reserve_bytes": plan.reserve,
        "room_tokens": plan.room,
        "fits": plan.fits,
        "gpus": [
            {
                "capacity_bytes": gpu.capacity,
                "weight_bytes": gpu.weight_bytes,
                "kv_bytes_per_token": gpu.cache_bytes,
                "holds": describe_parts(gpu.parts),
            }
            for gpu in plan.gpus
        ],
        "device_map": plan.device_map,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; 0 if the model and the context fit, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m stepaudio.lm.plan",
        description="Where each layer of a Step-1 model would go, from its config.json alone.",
        epilog="example: python -m stepaudio.lm.plan --model-path ROOT/Step-Audio-Chat --gpus 4x80 --context 8192",
    )
    parser.add_argument("--model-path", required=True, type=Path, help="folder with config.json, weights not needed")
    parser.add_argument("--gpus", required=True, help="NUMBERxGB, e.g. 4x80 or 2x80,1x48")
    parser.add_argument("--context", type=int, default=8192, help="tokens of KV cache wanted (default 8192)")
    parser.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPE_BYTES)} (default bf16)")
    parser.add_argument("--reserve", type=float, default=_RESERVE, help="GB kept free on each GPU (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if not 0 <= args.reserve <= MAX_GIGABYTES:
        raise RequestError(f"--reserve {args.reserve} is outside 0 to {MAX_GIGABYTES:,} GB")
    geometry = Geometry.from_config(read_config(args.model_path))
    plan = make_plan(geometry, parse_gpus(args.gpus), args.dtype, args.context, int(args.reserve * GB))
    print(json.dumps(as_json(plan)) if args.json else render(plan, args.model_path.resolve().name))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    run(main)
