"""Speech chat and recognition: a text, a sound, a folder of sounds, or many turns from JSONL; answers are spoken.

Without an input it runs two example turns: a text, then the sound of its own answer. Examples:
  python scripts/offline_inference.py --text "你好，你叫什么名字？" --speaker Tingting --output-dir out
  python scripts/offline_inference.py --input question.wav --history turns.json --json
  python scripts/offline_inference.py --task asr --input recordings/ --output-dir out
"""

from __future__ import annotations

import argparse
import logging

from stepaudio.commands.chat import add_arguments, run_command
from tokenizer.errors import run


def main() -> int:
    """Parses the command line and answers."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return run_command(parser.parse_args())


if __name__ == "__main__":
    run(main)
