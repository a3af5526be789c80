"""What is there, missing or broken: the three checkpoints, the packages, the device that would be used.

Exit code 0: everything needed is there; 1: something is broken; 2: the arguments make no sense.
Example: python scripts/doctor.py --model-path checkpoints/nano
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio.checkpoints import CHECKPOINTS
from stepaudio.doctor import doctor
from tokenizer.errors import run


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument(
        "--only", default=",".join(CHECKPOINTS), help="the checkpoints that are needed, separated by commas"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> int:
    """Prints the report."""
    args = arguments()
    return doctor(args.model_path, args.only.split(","), args.device, args.dtype, args.json)


if __name__ == "__main__":
    run(main)
