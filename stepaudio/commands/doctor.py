"""`stepaudio doctor` and scripts/doctor.py: what is there, missing or broken."""

from __future__ import annotations

import argparse

from stepaudio.checkpoints import CHECKPOINTS
from stepaudio.commands.options import add_model
from stepaudio.doctor import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument(
        "--only", default=",".join(CHECKPOINTS), help="the checkpoints that are needed, separated by commas"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_model(parser)


def run_command(args: argparse.Namespace) -> int:
    """Prints the report; 0 if all that is needed is there, 1 if something is broken."""
    return doctor(args.model_path, args.only.split(","), args.device, args.dtype, args.json)
