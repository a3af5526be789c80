"""The house rules: imports point one way, rooms stay small, every module imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("tokenizer", "cosyvoice", "stepaudio")
SOURCES = sorted(path for name in PACKAGES for path in (REPO / name).rglob("*.py"))
SCRIPTS = sorted((REPO / "scripts").glob("*.py"))
TESTS = sorted((REPO / "tests").rglob("*.py"))

# A room may import itself and the rooms named here; all others are above it.
# `stepaudio` alone stands for the small modules directly in that package.
BELOW = {
    "tokenizer": set(),
    "cosyvoice": {"tokenizer"},
    "stepaudio.lm": {"tokenizer"},
    "stepaudio.tts": {"tokenizer", "cosyvoice", "stepaudio.lm", "stepaudio.checkpoints", "stepaudio.device"},
    "stepaudio.chat": {
        "tokenizer",
        "cosyvoice",
        "stepaudio.lm",
        "stepaudio.tts",
        "stepaudio.checkpoints",
        "stepaudio.device",
    },
}


def room(module: str) -> str:
    """`stepaudio.lm.vocab` -> `stepaudio.lm`, `tokenizer.audio` -> `tokenizer`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "stepaudio" else parts[0]


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def test_imports_point_downward() -> None:
    wrong = []
    for path in SOURCES:
        here = room(".".join(path.relative_to(REPO).with_suffix("").parts))
        if here in BELOW:
            wrong += [
                f"{path.relative_to(REPO)} imports {name}"
                for name in imported(path)
                if room(name) != here and room(name) not in BELOW[here]
            ]
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "probe.py"
    file.write_text("def f():\n    from stepaudio.tts import engine\n")
    assert imported(file) == {"stepaudio.tts.engine"}
    assert room("stepaudio.tts.engine") not in BELOW["tokenizer"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_module_imports(path: Path) -> None:
    name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve() == path, f"another package called {name} hides ours"


def test_codes_alone_load_no_language_model() -> None:
    probe = "import sys, tokenizer.dual, cosyvoice.decoder; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, *TESTS], ids=lambda path: str(path.relative_to(REPO)))
def test_rooms_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{path} has {lines} lines: give part of it a room of its own"
