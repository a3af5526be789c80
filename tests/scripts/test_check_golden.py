"""The golden check as a program: its rows, and exit code 1 when a value differs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scripts.runner import message, run_script


def test_all_rows_of_a_component_pass(golden):
    ended = run_script("check_golden.py", "--golden", golden, "--only", "vocoder", "--json")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert ended.code == 0 and len(rows) > 10
    assert all(row["ok"] and row["component"] == "vocoder" and row["difference"] <= row["tolerance"] for row in rows)


def test_a_changed_weight_is_found(golden, tmp_path):
    for name in ("vocoder", "flow"):
        shutil.copytree(golden / name, tmp_path / name)
    path = tmp_path / "vocoder" / "hift.safetensors"
    weights = load_file(path)
    weights["conv_post.bias"] = weights["conv_post.bias"] + 0.01 * torch.ones_like(weights["conv_post.bias"])
    save_file(weights, path)
    ended = run_script("check_golden.py", "--golden", tmp_path)
    assert ended.code == 1
    assert "FAIL vocoder" in ended.out and "FAIL flow" not in ended.out and "ok   flow" in ended.out
    assert "not replayed: " in ended.err and "step1_lm" in ended.err


@pytest.mark.parametrize(
    "options, word",
    [
        (["--golden", "gone"], "gone"),
        (["--golden", "."], "holds none of"),
        (["--golden", ".", "--only", "abacus"], "abacus"),
        (["--golden", ".", "--only", "flow"], "golden.json"),
    ],
)
def test_bad_requests(options, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in message(run_script("check_golden.py", *options))
