"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepaudio.lm.base import AUTO, ENGINES
from stepaudio.lm.kernels.quantise import PRECISIONS
from tokenizer.errors import RequestError


def add_model(parser: argparse.ArgumentParser) -> None:
    """Where the checkpoints lie and what they run on."""
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="of the large models: auto, float32, bfloat16 or float16")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """How the language models are run."""
    parser.add_argument(
        "--engine",
        default=AUTO,
        choices=ENGINES,
        help="fast: fused weights, graphs and kernels; eager: the plain model (default: fast where it can run)",
    )
    parser.add_argument(
        "--precision",
        default=AUTO,
        choices=(AUTO, *PRECISIONS),
        help="of the language models' weights, with the fast engine (default: that of --dtype)",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_engine` as options of `open_lm`."""
    return {"engine": args.engine, "precision": args.precision}


def add_spread(parser: argparse.ArgumentParser) -> None:
    """How the chat model is spread over devices."""
    parser.add_argument(
        "--device-map",
        choices=["auto", "balanced", "balanced_low_0", "sequential"],
        help="spread the chat model over all CUDA devices (done without asking if it is too large for one)",
    )
    parser.add_argument("--max-memory", help="with --device-map, what it may take: 0=70GiB,1=70GiB,cpu=200GiB")


def spread_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_spread` as options of `open_lm`; none if none is given."""
    if args.max_memory is None:
        return {} if args.device_map is None else {"device_map": args.device_map}
    pairs = [part.strip().partition("=") for part in args.max_memory.split(",")]
    if not all(name and size for name, _, size in pairs):
        raise RequestError(f"--max-memory {args.max_memory!r} must look like 0=70GiB,1=70GiB,cpu=200GiB")
    limits = {int(name) if name.isdigit() else name: size for name, _, size in pairs}
    return {"device_map": args.device_map or "auto", "max_memory": limits}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; what is not given is the engine's default."""
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0.7, asr: 0)")
    parser.add_argument("--top-k", type=int, help="default: 50")
    parser.add_argument("--top-p", type=float, help="default: 0.9")
    parser.add_argument("--max-new-tokens", type=int, help="default: 2048")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_sampling` that are given, as fields of `SamplingParams`."""
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
