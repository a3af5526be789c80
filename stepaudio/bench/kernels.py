"""How close each kernel of the language model comes to the memory's speed, and what they add up to for one token.

    python -m stepaudio.bench.kernels --output kernels.json [--only gemv,step] [--tune]

Weights are random bits of the true shapes; every timing is a CUDA graph of several calls that walk through more
memory than the caches hold. --tune tries other block sizes for each product and prints the fastest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio.bench.report import Row, row, write
from stepaudio.device import resolve_device
from stepaudio.lm.attention import alibi_slopes
from stepaudio.lm.kernels import tiles
from stepaudio.lm.kernels.attention import decode_attention, prefill_attention
from stepaudio.lm.kernels.linear import NORM_INSIDE, Norm, linear
from stepaudio.lm.kernels.quantise import PRECISIONS, WORD_BITS, Packed, run_length
from tokenizer.errors import RequestError, run

PARTS = ("gemv", "few", "decode", "prefill", "step")
_SPAN = 300 * 10**6  # bytes that calls walk through before they meet the same weights again
_BF16 = torch.bfloat16

Shapes = dict[str, tuple[int, int]]  # name -> (out features, in features)
TTS: Shapes = {
    "qkv": (3584, 3072),
    "out": (3072, 3072),
    "gate_up": (16384, 3072),
    "down": (3072, 8192),
    "head": (74752, 3072),
}
CHAT: Shapes = {
    "qkv": (14336, 12288),
    "out": (12288, 12288),
    "gate_up": (62464, 12288),
    "down": (12288, 31232),
    "head": (74752, 12288),
}
CHAT_HALF: Shapes = {
    "qkv": (7168, 12288),
    "out": (12288, 6144),
    "gate_up": (31232, 12288),
    "down": (12288, 15616),
    "head": (37376, 12288),
}


def random_packed(columns: int, features: int, precision: str, device: torch.device) -> Packed:
    """A weight of random bits in its stored form, small enough that products stay finite."""
    if precision == "bfloat16":
        return Packed(
            precision, torch.empty(columns, features, dtype=_BF16, device=device).normal_(0, 0.01), None, features
        )
    if precision == "fp8":
        data = torch.randint(0, 56, (columns, features), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    else:
        run_numbers = run_length(WORD_BITS[precision])
        words = -(-features // run_numbers) * 16
        data = torch.randint(-(2**31), 2**31, (columns, words), dtype=torch.int32, device=device)
    if precision != "int4":
        return Packed(precision, data, torch.full((columns,), 1e-4, device=device), features)
    pair = torch.tensor([0.002, -0.015], dtype=_BF16).view(torch.int32).item()
    return Packed(
        precision, data, torch.full((columns, data.shape[1] // 16), pair, dtype=torch.int32, device=device), features
    )


def seconds_per_call(calls: list[Callable[[], object]], repeats: int = 10) -> list[float]:
    """Device seconds per call of a graph of these calls, `repeats` times; compiles and warms up first."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for index in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return times


def copy_speed(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.empty(2 * 10**9, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_per_call([lambda: target.copy_(source)], 5))


def product(
    name: str, shape: tuple[int, int], precision: str, rows: int, speed: float, tune: bool, device: torch.device
) -> Iterator[Row]:
    """Rows for one product with `rows` activations; for bfloat16 torch's own beside it."""
    columns, features = shape
    first = random_packed(columns, features, precision, device)
    copies = max(2, min(24, -(-_SPAN // first.nbytes))) if first.nbytes < _SPAN else 1
    weights = [first] + [random_packed(columns, features, precision, device) for _ in range(copies - 1)]
    x = torch.randn(rows, features, device=device, dtype=_BF16)
    silu = name.endswith("gate_up") and rows == 1
    normed = rows == 1 and precision in NORM_INSIDE and name.endswith(("qkv", "gate_up"))
    norm = Norm(torch.ones(features, device=device, dtype=_BF16), 1e-5) if normed else None

    def calls() -> list[Callable[[], object]]:
        return [lambda weight=weight: linear(x, weight, norm, silu=silu) for weight in weights]

    def result(label: str, times: list[float], **more: object) -> Row:
        rate = first.nbytes / sorted(times)[len(times) // 2]
        return _micro(f"{label} {name} {precision}, {rows} rows", times, tb_s=rate / 1e12, share=rate / speed, **more)

    yield result("product", seconds_per_call(calls()))
    if precision == "bfloat16":
        yield result("torch", seconds_per_call([lambda weight=weight: F.linear(x, weight.data) for weight in weights]))
    if tune:
        choices = tiles.gemv_choices(first) if rows == 1 else tiles.skinny_choices(first, rows)
        timed = []
        for choice in choices:
            with tiles.forced(choice):
                timed.append((sorted(seconds_per_call(calls(), 5)), choice))
        best = min(timed, key=lambda pair: pair[0][2])
        yield result("tuned", best[0], tile=best[1]._asdict())


def _micro(name: str, times: list[float], **more: object) -> Row:
    """A row in microseconds, and rounded extras."""
    extras = {key: round(value, 3) if isinstance(value, float) else value for key, value in more.items()}
    return row(name, [1e6 * seconds for seconds in times], 0, **extras) | {"unit": "us"}


def products(speed: float, tune: bool, device: torch.device) -> Iterator[Row]:
    """Every product of one decode step, batch 1."""
    wanted = [("3B", TTS, precision) for precision in PRECISIONS]
    for model, shapes, precision in [*wanted, ("130B", CHAT, "int4"), ("130B/2", CHAT_HALF, "bfloat16")]:
        for name, shape in shapes.items():
            yield from product(f"{model} {name}", shape, precision, 1, speed, tune, device)


def few_rows(speed: float, tune: bool, device: torch.device) -> Iterator[Row]:
    """Products of a small batch."""
    for precision in PRECISIONS:
        for rows in (8,) if precision == "bfloat16" else (8, 32):
            for name in ("out", "gate_up"):
                yield from product(f"3B {name}", TTS[name], precision, rows, speed, tune, device)


def _cache(batch: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, batch, 4, capacity, 64, device=device, dtype=_BF16))


def decoding(speed: float, tune: bool, device: torch.device) -> Iterator[Row]:
    """Decode attention of the 3B model."""
    slopes = alibi_slopes(48, device)
    for context in (1024, 8192):
        for batch in (1, 8, 32, 64):
            query = torch.randn(batch, 48, 64, device=device, dtype=_BF16)
            copies = max(1, min(16, _SPAN // (batch * context * 1024)))
            caches = [_cache(batch, context, device) for _ in range(copies)]
            lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
            fixed = (lengths, slopes, 0.125)
            times = seconds_per_call(
                [lambda q=query, c=cache, f=fixed: decode_attention(q, *c, *f) for cache in caches]
            )
            rate = 2 * caches[0][0].nbytes / sorted(times)[len(times) // 2]
            name = f"decode attention 3B, {batch} rows, context {context}"
            yield _micro(name, times, tb_s=rate / 1e12, share=rate / speed)


def prefilling(speed: float, tune: bool, device: torch.device) -> Iterator[Row]:
    """Prefill attention of both models, one layer."""
    for model, heads, groups, width in (("3B", 48, 4, 64), ("130B", 96, 8, 128)):
        for rows in (1000, 8000):
            query = torch.randn(1, rows, heads, width, device=device, dtype=_BF16)
            keys, values = torch.randn(2, 1, groups, rows, width, device=device, dtype=_BF16)
            start, count = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, rows))
            slopes = alibi_slopes(heads, device)
            times = seconds_per_call(
                [lambda q=query, k=keys, v=values, s=start, c=count, m=slopes: prefill_attention(q, k, v, s, c, m, 0.1)]
            )
            work = 2 * rows * rows * heads * width / sorted(times)[len(times) // 2] / 1e12
            yield _micro(f"prefill attention {model}, {rows} tokens", times, tflops=work)


def steps(speed: float, tune: bool, device: torch.device) -> Iterator[Row]:
    """One token through the kernels of a model's layers in one graph: no embedding, no sampling."""
    for precision in PRECISIONS:
        yield _step("3B", TTS, precision, (48, 4, 64), 32, 32, speed, device)
    yield _step("130B", CHAT, "int4", (96, 8, 128), 4, 88, speed, device)
    yield _step("130B/2", CHAT_HALF, "bfloat16", (48, 4, 128), 4, 88, speed, device)


def _step(
    model: str,
    shapes: Shapes,
    precision: str,
    heads: tuple[int, int, int],
    built: int,
    layers: int,
    speed: float,
    device: torch.device,
) -> Row:
    """`built` layers are timed and their time taken for all `layers`; the head counts once. Context 1,024."""
    count, groups, width = heads
    hidden = shapes["out"][0]
    stack = [
        {name: random_packed(*shape, precision, device) for name, shape in shapes.items() if name != "head"}
        for _ in range(built)
    ]
    caches = [tuple(torch.randn(2, 1, groups, 1024, width, device=device, dtype=_BF16)) for _ in stack]
    lengths = torch.full((1,), 1000, dtype=torch.int32, device=device)
    slopes = alibi_slopes(count, device)
    norm = Norm(torch.ones(hidden, device=device, dtype=_BF16), 1e-5)
    start = torch.randn(1, hidden, device=device, dtype=_BF16)

    def token() -> Tensor:
        x = start
        for layer, cache in zip(stack, caches):
            qkv = linear(x, layer["qkv"], norm).unflatten(1, (-1, width))
            query, key, value = qkv.split([count, groups, groups], 1)
            seen = decode_attention(query, *cache, lengths, slopes, 0.1, new=(key, value))
            x = linear(seen.flatten(1), layer["out"], residual=x)
            x = linear(linear(x, layer["gate_up"], norm, silu=True), layer["down"], residual=x)
        return x

    times = [seconds * layers / built for seconds in seconds_per_call([token])]
    head = random_packed(*shapes["head"], precision, device)
    last = sorted(seconds_per_call([lambda: linear(start, head)]))[0]
    total = layers * sum(part.nbytes for part in stack[0].values()) + head.nbytes
    times = [seconds + last for seconds in times]
    rate = total / sorted(times)[len(times) // 2]
    return _micro(f"one token {model} {precision}, context 1000", times, tb_s=rate / 1e12, share=rate / speed)


_PARTS = {"gemv": products, "few": few_rows, "decode": decoding, "prefill": prefilling, "step": steps}


def main() -> int:
    """Runs the parts asked for and prints one line per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    parser.add_argument("--tune", action="store_true", help="try other block sizes for every product")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(PARTS):
        raise RequestError(f"--only {options.only!r}: {', '.join(sorted(unknown))} unknown, use {', '.join(PARTS)}")
    device = resolve_device(options.device)
    if device.type != "cuda":
        raise RequestError(f"--device {options.device!r}: the kernels are timed on a CUDA device only")
    speed = copy_speed(device)
    print(f"copy {speed / 1e12:.2f} TB/s")
    rows: list[Row] = []
    with torch.inference_mode():
        for name in names:
            begin = time.perf_counter()
            for found in _PARTS[name](speed, options.tune, device):
                rows.append(found)
                more = "  ".join(f"{key} {found[key]}" for key in ("tb_s", "share", "tflops", "tile") if key in found)
                print(f"{found['name']:48} {found['median']:10.2f} us  {more}", flush=True)
            print(f"({name}: {time.perf_counter() - begin:.0f} s, compiling included)")
    if options.output:
        write(options.output, "python -m stepaudio.bench.kernels", rows)
    return 0


if __name__ == "__main__":
    run(main)
