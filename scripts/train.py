"""Trains one stage of a checkpoint, from its last state if there is one.

Example: python scripts/train.py --stage linguistic --configs configs/train/nano --out out/nano --minutes 8
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stepaudio.device import resolve_device
from stepaudio.train.run import STAGES, Job, run_stage
from tokenizer.errors import run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", required=True, choices=STAGES, help="what to make")
    parser.add_argument("--configs", type=Path, default=Path("configs/train/nano"), help="one YAML file per stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--speech", type=Path, help="folder of recorded sets, each with a transcripts.tsv (data stage)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that prepare data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    run_stage(
        Job(
            stage=args.stage,
            configs=args.configs,
            out=args.out,
            device=resolve_device(args.device),
            speech=args.speech,
            workers=args.workers,
            minutes=args.minutes,
        )
    )


if __name__ == "__main__":
    run(main)
