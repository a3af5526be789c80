"""What is there, missing or broken: the three checkpoints, the packages, the device that would be used.

Exit code 0: everything needed is there; 1: something is broken; 2: the arguments make no sense.
Example: python scripts/doctor.py --model-path checkpoints/nano
"""

from __future__ import annotations

import argparse

from stepaudio.commands.doctor import add_arguments, run_command
from tokenizer.errors import run


def main() -> int:
    """Parses the command line and prints the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return run_command(parser.parse_args())


if __name__ == "__main__":
    run(main)
