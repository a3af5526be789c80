"""Judges a checkpoint and writes the figures as JSON, each with its target and its baseline of the same run.

Example: python scripts/evaluate.py --model-path checkpoints/nano --speech SPEECH --parts asr,chat --limit 20
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

from stepaudio.bench.report import machine
from stepaudio.checkpoints import find_root
from stepaudio.device import resolve_device
from stepaudio.eval.crew import Crew, Setup
from stepaudio.eval.desk import Desk
from stepaudio.eval.exam import Exam
from stepaudio.eval.judges import versions
from stepaudio.eval.nano import PARTS, evaluate
from stepaudio.eval.rows import Results, Run, checkpoint_hash, table
from stepaudio.eval.store import Store
from stepaudio.lm.base import AUTO
from tokenizer.errors import RequestError, run
from tokenizer.files import check_target


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many items per figure, for a quick look")
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument("--configs", type=Path, default=Path("configs/train/nano"), help="data.yaml and domain.yaml")
    parser.add_argument("--speech", type=Path, help="folder of the recorded sets; asr, codec and clone need it")
    parser.add_argument("--attempts", type=int, default=3, help="how often a doubtful piece of speech is drawn")
    parser.add_argument("--seed", type=int, default=1, help="of the questions and sentences")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--precision", default=AUTO, help="of the language models' weights: bfloat16, int8, fp8, int4")
    parser.add_argument("--workers", type=int, help="processes, each with an engine (default: 8 on a GPU, else cores)")
    parser.add_argument("--work", type=Path, help="folder that keeps every sound: made once, judged again elsewhere")
    parser.add_argument("--again", action="store_true", help="run parts that are done as well")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/nano.json"), help="file to write or go on with")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    parts = args.parts.split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        raise RequestError(f"unknown part {wrong[0]!r}: choose from {', '.join(PARTS)}")
    if args.limit is not None and args.limit < 1:
        raise RequestError(f"--limit {args.limit} must be at least 1")
    check_target(args.out, (".json",))
    device, root = resolve_device(args.device), find_root(args.model_path)
    mark = checkpoint_hash(root) + ("" if args.precision == AUTO else f"-{args.precision}")
    places = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["scripts/evaluate.py", *places])
    results = Results.open(args.out, Run(command, mark, args.seed, args.limit, {**machine(), **versions()}))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(args.work or Path(folder))
        setup = Setup(
            root,
            str(device),
            args.dtype,
            args.precision,
            attempts=args.attempts,
            voices=store.folder / f"{mark}-voices",
        )
        cores = os.cpu_count() or 1
        crew = Crew(setup, (8 if device.type == "cuda" else cores) if args.workers is None else args.workers)
        try:
            evaluate(
                Desk(Exam(args.configs, args.speech, args.limit, args.seed), crew, store, mark),
                results,
                parts,
                args.again,
            )
        finally:
            crew.close()
    print("\n" + table(results.rows))


if __name__ == "__main__":
    run(main)
