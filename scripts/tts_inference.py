"""Text to speech: a registered voice or a cloned one; one text, a file, or many from JSONL.

Without a text it speaks an example line, a rap and a hummed line if the speaker has such voices, and a
line with the speaker's voice cloned. Examples:
  python scripts/tts_inference.py --text "（高兴1）你好，欢迎回来。" --speaker Tingting
  python scripts/tts_inference.py --text "Hello there." --prompt-wav me.wav --prompt-text "what I say in it"
  python scripts/tts_inference.py --input-jsonl jobs.jsonl --output-path out
"""

from __future__ import annotations

import argparse
import logging

from stepaudio.tts.command import add_arguments, run_command
from tokenizer.errors import run


def main() -> int:
    """Parses the command line and speaks."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return run_command(parser.parse_args())


if __name__ == "__main__":
    run(main)
