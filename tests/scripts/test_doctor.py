"""The report on a checkpoint folder and its exit codes."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest

from stepaudio.checkpoints import CHECKPOINTS
from stepaudio.doctor import diagnose, doctor
from tokenizer.errors import RequestError

REPO = Path(__file__).parents[2]


def test_a_healthy_folder(tiny, capsys):
    assert doctor(tiny, device="cpu") == 0
    report = capsys.readouterr().out
    for words in (*CHECKPOINTS.values(), "flow.pt", "device cpu, dtype float32", "CPUExecutionProvider", "torch 2."):
        assert words in report
    assert report.rstrip().endswith("everything needed is there")


def test_a_missing_part_matters_only_where_it_is_needed(tiny, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(tiny / CHECKPOINTS["tokenizer"], root / CHECKPOINTS["tokenizer"], copy_function=os.link)
    assert doctor(root, only=["tokenizer"], device="cpu") == 0
    assert doctor(root, only=["tokenizer", "tts"], device="cpu", as_json=True) == 1
    report = json.loads(capsys.readouterr().out.split("there\n", 1)[1])
    assert not report["healthy"] and report["packages"] == dict.fromkeys(["tokenizer", "cosyvoice", "stepaudio"], "ok")
    assert [f["file"] for f in report["findings"] if f["status"] == "missing"] == [CHECKPOINTS["tts"]]


def test_unknown_names_are_refused(tiny):
    with pytest.raises(RequestError, match="asr"):
        diagnose(tiny, only=["asr"])


@pytest.mark.parametrize("options", [["--model-path", "gone"], ["--device", "cuda:99"], ["--only", "asr"]])
def test_the_script_exits_with_2_on_bad_arguments(tiny, monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["doctor.py", "--model-path", str(tiny), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "scripts" / "doctor.py"), run_name="__main__")
    assert ended.value.code == 2
    assert options[1] in capsys.readouterr().err
