"""`stepaudio tags`: the style tags that may stand before a text."""

from __future__ import annotations

import argparse

from stepaudio.tts.style import render_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No option."""


def run_command(args: argparse.Namespace) -> int:
    """Prints the table."""
    print(render_table())
    return 0
