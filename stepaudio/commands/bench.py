"""`stepaudio bench`: measurements with a baseline in the same run, as JSON rows."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from stepaudio.bench import codec, report
from stepaudio.checkpoints import find_root, require_checkpoint
from tokenizer.errors import RequestError
from tokenizer.files import check_target

MAX_SECONDS = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    add = parser.add_argument
    add(
        "name",
        choices=["semantic", "encode", "stages"],
        help="semantic: our semantic tokenizer beside onnxruntime; encode: time and memory by length of sound; "
        "stages: tokenizer, flow and vocoder of a round trip",
    )
    add("--seconds", default="30", help="of sound, several lengths by commas (default: 30)")
    add("--repeats", type=int, default=5, help="timings of each thing (default: 5; encode: one per length)")
    add("--device", default="auto", help="for stages: auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0, help="of the sound")
    add("--output", type=Path, help="also write the rows, the command and the machine to this .json file")
    add("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")


def run_command(args: argparse.Namespace) -> int:
    """Prints one row per measurement."""
    lengths = _lengths(args.seconds)
    if args.repeats < 1:
        raise RequestError(f"--repeats {args.repeats} must be at least 1")
    if args.output is not None:
        check_target(args.output, (".json",))
    root = find_root(args.model_path)
    require_checkpoint(root, "tokenizer")
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
        report.write(args.output, shlex.join(["stepaudio", "bench", *sys.argv[2:]]), rows)
    return 0


def _lengths(text: str) -> list[float]:
    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(0.5 <= seconds <= MAX_SECONDS for seconds in lengths):
        raise RequestError(f"--seconds {text!r} must be numbers from 0.5 to {MAX_SECONDS:g}, separated by commas")
    return lengths
