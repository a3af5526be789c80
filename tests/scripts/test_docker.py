"""The two Dockerfiles: what they copy is there, what they call exists, what they promise is in them."""

import fnmatch
import importlib
import json
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from stepaudio.cli import COMMANDS

REPO = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "Dockerfile-vllm")


def steps(name):
    """(instruction, argument) pairs, continued lines joined, and the comments."""
    text = (REPO / name).read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    pairs = [tuple(line.split(maxsplit=1)) for line in body.splitlines() if line.strip()]
    return pairs, " ".join(comments).replace("\\ ", " ")


def of(name, instruction):
    return [argument for found, argument in steps(name)[0] if found == instruction]


def in_context(path):
    """Whether .dockerignore lets a path into the build."""
    kept = False
    for pattern in (REPO / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            kept = pattern.startswith("!")
    return kept


@pytest.mark.parametrize("name", FILES)
def test_every_copied_path_exists_and_is_sent(name):
    sources = [source for argument in of(name, "COPY") for source in argument.split()[:-1]]
    assert {"setup.py", "stepaudio", "tokenizer", "cosyvoice", "configs", "scripts"} <= set(sources)
    for source in sources:
        assert (REPO / source).exists(), f"{name} copies {source}, which is not there"
        assert in_context(source), f".dockerignore holds {source} back"


@pytest.mark.parametrize("name", FILES)
def test_what_setup_reads_is_copied(name):
    copied = " ".join(of(name, "COPY"))
    for file in re.findall(r'"([\w.-]+\.(?:txt|md))"', (REPO / "setup.py").read_text()):
        assert file in copied


@pytest.mark.parametrize("name", FILES)
def test_bases_are_pinned(name):
    [base] = of(name, "FROM")
    image, tag = base.rsplit(":", 1)
    assert tag != "latest" and any(char.isdigit() for char in tag)
    if name == "Dockerfile":
        assert image == "nvidia/cuda" and "runtime" in tag
    else:
        assert image == "vllm/vllm-openai"
        assert 20 <= int(re.fullmatch(r"v0\.(\d+)\.\d+", tag)[1]) <= 24


@pytest.mark.parametrize("name", FILES)
def test_commands_exist(name):
    program, *options = json.loads(of(name, "ENTRYPOINT")[0])
    assert json.loads(of(name, "CMD")[0]) == ["--help"]
    if program == "stepaudio":
        assert '"stepaudio = stepaudio.cli:entry"' in (REPO / "setup.py").read_text()
        assert options == []
    else:
        assert [program, options[0]] == ["vllm", "serve"]
    _, comments = steps(name)
    for script in re.findall(r"scripts/\w+\.py", comments + " ".join(argument for _, argument in steps(name)[0])):
        assert (REPO / script).is_file()


def test_the_examples_in_the_comments_parse():
    _, comments = steps("Dockerfile")
    name, *arguments = shlex.split(re.search(r" stepaudio ((?:\w+) --.*?--output-dir \S+)", comments)[1])
    parser = ArgumentParser(allow_abbrev=False)
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    assert parser.parse_args(arguments).output_dir


def test_it_runs_as_a_plain_user_with_models_outside():
    pairs, _ = steps("Dockerfile")
    instructions = [instruction for instruction, _ in pairs]
    [user] = of("Dockerfile", "USER")
    assert user not in ("root", "0")
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    assert any(f" {user}" in argument and "useradd" in argument for argument in of("Dockerfile", "RUN"))
    assert any("STEPAUDIO_MODEL_PATH=" in argument for argument in of("Dockerfile", "ENV"))


def test_the_server_gets_what_step1_needs():
    options = json.loads(of("Dockerfile-vllm", "ENTRYPOINT")[0])
    assert json.loads(options[options.index("--hf-overrides") + 1]) == {"tie_word_embeddings": False}
    assert options[options.index("--attention-backend") + 1] == "TRITON_ATTN"
    documented = (REPO / "scripts" / "call_vllm_chat.py").read_text(encoding="utf-8")
    assert "--attention-backend TRITON_ATTN" in documented
    assert """--hf-overrides '{"tie_word_embeddings": false}'""" in documented
