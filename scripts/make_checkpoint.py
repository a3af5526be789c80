"""A checkpoint with random weights in the release's full layout: tiny for tests, full-size for benchmarks.

`full` writes 1.2 GB for the tokenizer, 8.1 GB for tts and 264 GB for chat: choose with --only.
Example: python scripts/make_checkpoint.py --preset tiny --out out/tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio.checkpoints import CHECKPOINTS
from stepaudio.make_checkpoint import make_checkpoint
from stepaudio.make_checkpoint.presets import PRESETS
from tokenizer.errors import run


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the models")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--only", default=",".join(CHECKPOINTS), help="the checkpoints to make, separated by commas")
    return parser.parse_args()


def main() -> None:
    """Makes the checkpoint and says how large it is."""
    args = arguments()
    root = make_checkpoint(args.out, args.preset, args.seed, only=args.only.split(","), progress=args.preset == "full")
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"{root}: {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run(main)
