"""What the README shows is run: its commands, its Python, its tables and links; every YAML file is loaded."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from stepaudio.bench.table import gpu_table
from stepaudio.bench.table import table as measurements
from stepaudio.chat.prompts import prompts
from stepaudio.cli import COMMANDS, main
from stepaudio.lm.plan import main as plan
from stepaudio.tts.prompt import system_prompt
from stepaudio.tts.style import table
from tests.scripts.runner import run_script

REPO = Path(__file__).resolve().parents[1]
READMES = [REPO / "README.md", REPO / "README_CN.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    lines = [line for block in blocks(path, "bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


SHOWN = [command for command in commands(REPO / "README.md") if command[0] != "make"]


@pytest.mark.parametrize("command", SHOWN, ids=" ".join)
def test_commands_run(command, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *arguments = [part.replace("ROOT", str(tiny)) for part in command]
    if name == "stepaudio":
        assert main([*arguments, "--device", "cpu"]) == 0
    elif arguments[:2] == ["-m", "stepaudio.lm.plan"]:
        monkeypatch.setattr("sys.argv", ["plan", *arguments[2:]])
        assert plan() == 0
    else:
        assert name == "python" and arguments[0].startswith("scripts/")
        options = [part for part in arguments[1:] if part not in ("--device-map", "auto")]
        ended = run_script(arguments[0].removeprefix("scripts/"), *options, "--device", "cpu")
        assert ended.code == 0, ended.err
        assert list(tmp_path.rglob("*.wav"))


def test_make_targets_exist():
    targets = {command[1] for path in READMES for command in commands(path) if command[0] == "make"}
    makefile = (REPO / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    answered, streamed = blocks(REPO / "README.md", "python")
    (tmp_path / "checkpoints").symlink_to(REPO / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(streamed, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 1
    exec(compile(answered, "README.md", "exec"), {})
    assert "paris" in capsys.readouterr().out
    assert (tmp_path / "reply.wav").stat().st_size > 44


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:scripts|configs|tests|stepaudio|checkpoints|benchmarks)/[\w./-]*)`", text))
    names |= set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    assert len(names) > 5
    assert not [name for name in names if not (REPO / name).exists()]


def test_both_readmes_show_the_same():
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert blocks(english, "python") == blocks(chinese, "python")
    scripts = [set(re.findall(r"scripts/\w+\.(?:py|sh)", path.read_text(encoding="utf-8"))) for path in READMES]
    assert (
        scripts[0] == scripts[1] == {f"scripts/{path.name}" for path in (REPO / "scripts").iterdir() if path.is_file()}
    )


def test_every_console_command_is_named():
    text = READMES[0].read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in COMMANDS)


def test_every_prompt_and_style_file_loads():
    assert {"asr", "translate", "role_play", "tools"} <= set(prompts())
    assert system_prompt() and system_prompt("x") and len(table()) > 10


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_is_read(path):
    if path.name == "cosyvoice.yaml":
        from cosyvoice.config import read_config

        assert read_config(path).sample_rate == 22050
    else:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_table_of_measurements_is_current():
    for made in (measurements(), gpu_table()):
        assert all(made in path.read_text(encoding="utf-8") for path in READMES)
