"""`stepaudio bench`: measurements with a baseline in the same run, as JSON rows."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from stepaudio.bench import chat130b, codec, decoder, lm, report, stream, tokenizer, tts
from stepaudio.checkpoints import find_root, require_checkpoint
from stepaudio.device import resolve_device, resolve_dtype
from stepaudio.lm.kernels.quantise import PRECISIONS, check_precision
from stepaudio.lm.session import MAX_ROWS
from tokenizer.errors import RequestError
from tokenizer.files import check_target

MAX_SECONDS = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    add = parser.add_argument
    add(
        "name",
        choices=["semantic", "encode", "stages", "flow", "vocoder", "tokenizer", "lm", "chat130b", "tts", "stream"],
        help="semantic: our semantic tokenizer beside onnxruntime; encode: time and memory by length of sound; "
        "stages: tokenizer, flow and vocoder of a round trip; flow, vocoder, tokenizer: one part by length and batch; "
        "lm: the language model, eager and fast; "
        "chat130b: the chat model's true shapes with random weights, on one GPU and on two; "
        "tts: text to speech, one and a batch; stream: first sound and underruns, one stream and several",
    )
    add("--seconds", help="of sound, several lengths by commas (default: 30; tts and stream: 10)")
    add("--repeats", type=int, default=5, help="timings of each thing (default: 5; encode: one per length)")
    add("--device", default="auto", help="but for semantic and encode: auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0, help="of the sound or the weights")
    choices = [*sorted(lm.GEOMETRIES), "full"]
    add("--random", choices=choices, help="lm, tts, stream (3b), flow, vocoder, tokenizer (full): these random weights")
    add("--batch", default=None, help="by commas (lm: 1,8,32,64; tts: 32; stream: 8; on the CPU less)")
    add("--context", default=None, help="lm: tokens by commas (default: 1024,8192; on the CPU 1024)")
    add("--precision", default=None, help="lm: by commas (default: all; on the CPU bfloat16, the weights as they are)")
    add("--dtype", default="auto", help="lm, tts, stream, flow: auto, float32 or bfloat16")
    add(
        "--max-seconds",
        type=float,
        default=100.0,
        help="lm, flow, vocoder, tokenizer: what would begin later is left out",
    )
    add("--layers", type=int, help="chat130b: fewer than the model's 88, for a quick look")
    add("--output", type=Path, help="also write the rows, the command and the machine to this .json file")
    add("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")


def run_command(args: argparse.Namespace) -> int:
    """Prints one row per measurement."""
    defaults = {"tts": "10", "stream": "10", "flow": "1,10,30", "vocoder": "1,10,30", "tokenizer": "1,10,30"}
    lengths = _lengths(args.seconds or defaults.get(args.name, "30"))
    if args.repeats < 1:
        raise RequestError(f"--repeats {args.repeats} must be at least 1")
    if args.output is not None:
        check_target(args.output, (".json",))
    if args.name in ("lm", "chat130b"):
        _run_rows(args, lm.measure(lm_plan(args)) if args.name == "lm" else chat130b.measure(chat_plan(args)))
        return 0
    if args.name in ("flow", "vocoder", "tokenizer"):
        _run_rows(args, parts_rows(args, lengths))
        return 0
    root = find_root(args.model_path)
    require_checkpoint(root, "tokenizer")
    if args.name in ("tts", "stream"):
        _run_rows(args, (tts if args.name == "tts" else stream).measure(speech_plan(args, root, lengths[0])))
        return 0
    if args.name == "encode":
        rows = codec.encode_length(root, lengths, args.seed)
    elif args.name == "semantic":
        rows = [row for seconds in lengths for row in codec.semantic(root, seconds, args.repeats, args.seed)]
    else:
        require_checkpoint(root, "tts")
        rows = [row for seconds in lengths for row in codec.stages(root, seconds, args.repeats, args.seed, args.device)]
    for row in rows:
        print(json.dumps(row))
    if args.output is not None:
        report.write(args.output, _command(), rows)
    return 0


def _command() -> str:
    return shlex.join(["stepaudio", "bench", *sys.argv[2:]])


def _run_rows(args: argparse.Namespace, measured: Iterable[report.Row]) -> None:
    """Prints and writes each row as it is measured."""
    rows: list[report.Row] = []
    for row in measured:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.output is not None:
            report.write(args.output, _command(), rows)


def parts_rows(args: argparse.Namespace, lengths: list[float]) -> Iterable[report.Row]:
    """What `bench flow`, `bench vocoder` and `bench tokenizer` measure; RequestError for what is not possible."""
    if args.random not in (None, "full"):
        raise RequestError(f"--random {args.random} is a language model: use full")
    folder = None if args.random else find_root(args.model_path)
    if folder is not None:
        require_checkpoint(folder, "tokenizer" if args.name == "tokenizer" else "tts")
    device = resolve_device(args.device)
    [batch] = _numbers("--batch", args.batch or "32", 1, 1024)[:1]
    more = {"batch": batch, "repeats": args.repeats, "seed": args.seed, "folder": folder, "seconds": args.max_seconds}
    if args.name == "tokenizer":
        return tokenizer.measure(tokenizer.Plan(device, lengths, **more))
    return decoder.measure(decoder.Plan(device, resolve_dtype(args.dtype, device), lengths, **more), args.name)


def chat_plan(args: argparse.Namespace) -> chat130b.Plan:
    """What `bench chat130b` is to measure; RequestError for what is not possible."""
    contexts = _numbers("--context", args.context, 64, 2**20) if args.context else chat130b.CONTEXTS
    return chat130b.plan_for(resolve_device(args.device), contexts, args.layers, args.seed)


def speech_plan(args: argparse.Namespace, root: Path, seconds: float) -> tts.Plan:
    """What `bench tts` and `bench stream` are to measure; RequestError for what is not possible."""
    if args.random not in (None, "3b"):
        raise RequestError(f"--random {args.random} is no speech model: use 3b")
    require_checkpoint(root, "tts")
    device = resolve_device(args.device)
    most = {"tts": "32" if device.type == "cuda" else "4", "stream": "8" if device.type == "cuda" else "2"}
    [batch] = _numbers("--batch", args.batch or most[args.name], 1, MAX_ROWS)[:1]
    return tts.Plan(
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        folder=root,
        random=args.random is not None,
        seconds=seconds,
        repeats=args.repeats,
        batch=batch,
        streams=batch,
        seed=args.seed,
    )


def lm_plan(args: argparse.Namespace) -> lm.Plan:
    """What `bench lm` is to measure; RequestError for a size or a precision that is not possible."""
    if args.random == "full":
        raise RequestError(
            f"--random full is for flow, vocoder and tokenizer: use {' or '.join(sorted(lm.GEOMETRIES))}"
        )
    device = resolve_device(args.device)
    cpu = device.type != "cuda"
    folder = None if args.random else require_checkpoint(find_root(args.model_path), "tts")
    precisions = (args.precision or ("bfloat16" if cpu else ",".join(PRECISIONS))).split(",")
    plan = lm.Plan(
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        batches=_numbers("--batch", args.batch or ("1,8" if cpu else "1,8,32,64"), 1, MAX_ROWS),
        contexts=_numbers("--context", args.context or ("1024" if cpu else "1024,8192"), 64, 2**20),
        precisions=[check_precision(one) for one in precisions],
        seed=args.seed,
        folder=folder,
        random=args.random,
        seconds=args.max_seconds,
    )
    longest = plan.geometry.max_seq_len
    if max(plan.contexts) > longest and args.context is None:
        return replace(plan, contexts=sorted({min(one, longest) for one in plan.contexts}))
    if max(plan.contexts) > longest:
        raise RequestError(f"--context {max(plan.contexts)} is beyond the model's context of {longest}")
    return plan


def _numbers(name: str, text: str, low: int, high: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and low <= int(part) <= high for part in parts):
        raise RequestError(f"{name} {text!r} must be whole numbers in {low}..{high}, separated by commas")
    return [int(part) for part in parts]


def _lengths(text: str) -> list[float]:
    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(0.5 <= seconds <= MAX_SECONDS for seconds in lengths):
        raise RequestError(f"--seconds {text!r} must be numbers from 0.5 to {MAX_SECONDS:g}, separated by commas")
    return lengths
