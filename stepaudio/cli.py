"""The console command `stepaudio`: finds the command that is asked for and imports nothing else.

Knows the names, a line about each and an example; what a command does is in its module.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from tokenizer.errors import run


class Command(NamedTuple):
    """A module with `add_arguments` and `run_command`, and its help."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "chat": Command(
        "stepaudio.commands.chat",
        "answer texts, sounds and conversations, spoken and written",
        'stepaudio chat --text "What is your name?" --output-dir out\nstepaudio chat --input questions.jsonl --json',
    ),
    "tts": Command(
        "stepaudio.tts.command",
        "speak texts in a registered voice or a cloned one",
        'stepaudio tts --text "（高兴1）你好，欢迎回来。" --output-path out',
    ),
    "transcribe": Command(
        "stepaudio.commands.transcribe", "write sound files down", "stepaudio transcribe meeting.wav memo.mp3 --json"
    ),
    "tokenize": Command(
        "stepaudio.commands.tokenize",
        "sound files to audio codes, token ids or <audio_N> text",
        "stepaudio tokenize clip.wav --json > codes.json",
    ),
    "decode": Command(
        "stepaudio.commands.decode",
        "audio codes to a sound file",
        "stepaudio decode codes.json -o again.wav --voice clip.wav",
    ),
    "tags": Command("stepaudio.commands.tags", "the style tags that may stand before a text", "stepaudio tags"),
    "doctor": Command(
        "stepaudio.commands.doctor",
        "what is there, missing or broken",
        "stepaudio doctor --model-path checkpoints/nano",
    ),
    "bench": Command(
        "stepaudio.commands.bench",
        "measure the codec, with a baseline in the same run",
        "stepaudio bench encode --seconds 10,60 --output encode.json",
    ),
    "convert-tokenizer": Command(
        "stepaudio.commands.convert_tokenizer",
        "write a tokenizer.json with the right ids for other tools",
        "stepaudio convert-tokenizer models/Step-Audio-Chat",
    ),
}


def entry() -> NoReturn:
    """What the console command calls."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run(lambda: main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code; without a command it prints the overview."""
    if not arguments:
        _overview().print_help()
        return 0
    name = _overview().parse_args(arguments[:1]).command
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"stepaudio {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"example:\n{_indented(command.example)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module.run_command(parser.parse_args(arguments[1:])) or 0


def _overview() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<19}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="stepaudio",
        usage="stepaudio COMMAND ...",
        description="Speech chat, recognition and synthesis with the Step-Audio models.",
        epilog=f"commands:\n{lines}\n\nexample:\n  stepaudio tts --help\n{_indented(COMMANDS['chat'].example)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
