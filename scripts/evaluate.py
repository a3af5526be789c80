"""Judges a checkpoint and writes the figures as JSON.

Example: python scripts/evaluate.py --task asr --task chat --model-path checkpoints/nano --speech SPEECH
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stepaudio.bench.report import write
from stepaudio.chat.engine import StepAudio
from stepaudio.checkpoints import find_root
from stepaudio.device import resolve_device, resolve_dtype
from stepaudio.eval.nano import TASKS, Exam
from tokenizer.errors import run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given several times (default: all)")
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument("--configs", type=Path, default=Path("configs/train/nano"), help="data.yaml and domain.yaml")
    parser.add_argument("--speech", type=Path, help="folder of recorded sets; asr and codec use an4 in it")
    parser.add_argument("--count", type=int, default=60, help="items per figure (AN4: the whole test set for asr)")
    parser.add_argument("--attempts", type=int, default=3, help="how often a doubtful piece of speech is drawn")
    parser.add_argument("--seed", type=int, default=1, help="of the questions and sentences")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/nano.json"), help="file to write")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device, root = resolve_device(args.device), find_root(args.model_path)
    options = {"max_attempts": args.attempts}
    engine = StepAudio.from_dir(root, device, resolve_dtype(args.dtype, device), tts_options=options)
    exam = Exam(engine, args.configs, args.speech, args.count, args.seed)
    rows = []
    for task in args.task or TASKS:
        for row in TASKS[task](exam):
            rows.append({"task": task, "seed": args.seed, **row})
            print(rows[-1], flush=True)
            write(args.out, " ".join(sys.argv), rows)


if __name__ == "__main__":
    run(main)
