"""Runs a script of the repository inside this process and catches what it prints and how it ends."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run_script(name: str, *arguments: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    argv = [name, *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, out.getvalue(), err.getvalue())


def message(ended: Ended) -> str:
    """The error text: one or two lines, no traceback, exit code 2."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("not replayed")]
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), ended.err
    return ended.err
