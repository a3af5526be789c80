"""Where checkpoints are looked for, and what is said about the files in them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stepaudio import checkpoints
from stepaudio.check import Status, check
from stepaudio.checkpoints import ASR_DIR, CHECKPOINTS, default_root, find_root, require_checkpoint
from tokenizer.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TOKENIZER, TTS, CHAT = CHECKPOINTS["tokenizer"], CHECKPOINTS["tts"], CHECKPOINTS["chat"]
FLOW = f"{TTS}/CosyVoice-300M-25Hz"
MUSIC = f"{TTS}/CosyVoice-300M-25Hz-Music"


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny checkpoint; files are links, so a test writes through `replace`."""
    return Path(shutil.copytree(tiny, tmp_path / "root", copy_function=os.link))


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def cut(path, keep=0.5):
    content = path.read_bytes()
    replace(path, content[: int(len(content) * keep)])


def edit_json(path, **changes):
    replace(path, json.dumps(json.loads(path.read_text()) | changes).encode())


def by_file(findings):
    return {finding.file: finding for finding in findings}


def test_a_whole_checkpoint_has_no_complaint(tiny):
    findings = check(tiny)
    assert {finding.status for finding in findings} == {Status.OK}, findings
    files = {finding.file for finding in findings}
    assert {f"{TOKENIZER}/speech_tokenizer_v1.onnx", f"{FLOW}/flow.pt", f"{MUSIC}/hift.pt"} <= files
    assert {f"{CHAT}/model-00001.safetensors", f"{TTS}/tokenizer.model", f"{TOKENIZER}/{ASR_DIR}/am.mvn"} <= files


def test_damage_to_the_tokenizer(copy):
    folder = copy / TOKENIZER
    cut(folder / "speech_tokenizer_v1.onnx")
    cut(folder / ASR_DIR / "model.pt")
    replace(folder / ASR_DIR / "am.mvn", b"<Nnet> \n<Splice> 560 560 \n")
    replace(folder / "linguistic_tokenizer.npy", b"")
    (folder / ASR_DIR / "config.yaml").unlink()
    found = by_file(check(copy, only=["tokenizer"]))
    expected = {
        "speech_tokenizer_v1.onnx": (Status.DAMAGED, "truncated"),
        f"{ASR_DIR}/model.pt": (Status.DAMAGED, "truncated"),
        f"{ASR_DIR}/am.mvn": (Status.DAMAGED, "AddShift"),
        "linguistic_tokenizer.npy": (Status.EMPTY, ""),
        f"{ASR_DIR}/config.yaml": (Status.MISSING, ""),
    }
    for file, (status, words) in expected.items():
        finding = found[f"{TOKENIZER}/{file}"]
        assert finding.status is status and words in finding.detail, finding
        assert finding.broken == (not file.endswith("config.yaml"))


def test_shapes_that_disagree_in_the_tokenizer(copy):
    folder = copy / TOKENIZER
    (folder / "linguistic_tokenizer.npy").unlink()
    np.save(folder / "linguistic_tokenizer.npy", np.zeros((1024, 7), np.float32))
    finding = by_file(check(copy, only=["tokenizer"]))[f"{TOKENIZER}/{ASR_DIR}/model.pt"]
    assert finding.status is Status.MISMATCH and "(1024, 7)" in finding.detail


def test_damage_to_the_speech_checkpoint(copy):
    replace(copy / TTS / "model-00002.safetensors", POINTER)
    cut(copy / TTS / "model-00001.safetensors", 0.99)
    replace(copy / TTS / "tokenizer.model", b"no model")
    cut(copy / FLOW / "flow.pt")
    edit = torch.load(copy / FLOW / "hift.pt")
    edit["conv_pre.weight_g"] = edit["conv_pre.weight_g"][:, 0]
    (copy / FLOW / "hift.pt").unlink()
    torch.save(edit, copy / FLOW / "hift.pt")
    cut(copy / FLOW / "campplus.onnx")
    (copy / MUSIC / "cosyvoice.yaml").unlink()
    (copy / TTS / "speakers" / "Tingting_prompt.wav").unlink()
    found = by_file(check(copy, only=["tts"]))
    expected = {
        f"{TTS}/model-00001.safetensors": (Status.DAMAGED, "its header promises"),
        f"{TTS}/model-00002.safetensors": (Status.POINTER, ""),
        f"{TTS}/tokenizer.model": (Status.DAMAGED, "sentencepiece"),
        f"{FLOW}/cosyvoice.yaml": (Status.OK, ""),
        f"{FLOW}/flow.pt": (Status.DAMAGED, "truncated"),
        f"{FLOW}/hift.pt": (Status.DAMAGED, "conv_pre.weight_g"),
        f"{FLOW}/campplus.onnx": (Status.DAMAGED, "ONNX"),
        f"{MUSIC}/cosyvoice.yaml": (Status.MISSING, ""),
        f"{MUSIC}/flow.pt": (Status.OK, "not compared"),
        f"{TTS}/speakers": (Status.DAMAGED, "Tingting_prompt.wav"),
    }
    for file, (status, words) in expected.items():
        assert found[file].status is status and words in found[file].detail, found[file]


def test_configs_that_describe_other_models(copy):
    edit_json(copy / TTS / "config.json", hidden_size=96, vocab_size=100)
    yaml = (copy / FLOW / "cosyvoice.yaml").read_text()
    yaml = yaml.replace("base_channels: 32", "base_channels: 64").replace("vocab_size: 5120", "vocab_size: 6000")
    replace(copy / FLOW / "cosyvoice.yaml", yaml.replace("spk_embed_dim: 192", "spk_embed_dim: 128").encode())
    shutil.rmtree(copy / MUSIC)
    shutil.rmtree(copy / TTS / "speakers")
    found = by_file(check(copy, only=["tts"]))
    expected = {
        f"{TTS}/model.safetensors.index.json": "the config asks for",
        f"{TTS}/tokenizer.model": "pieces",
        f"{FLOW}/flow.pt": "6000",
        f"{FLOW}/hift.pt": "64",
        f"{FLOW}/campplus.onnx": "128",
    }
    for file, words in expected.items():
        assert found[file].status is Status.MISMATCH and words in found[file].detail, found[file]
    for file in (MUSIC, f"{TTS}/speakers"):
        assert found[file].status is Status.MISSING and not found[file].broken


@pytest.mark.parametrize("damage", ["shard", "index", "entry", "folder"])
def test_shards_and_index(copy, damage):
    folder = copy / CHAT
    index = folder / "model.safetensors.index.json"
    if damage == "shard":
        (folder / "model-00002.safetensors").unlink()
        file, status, words = index, Status.MISSING, "1 of 2 weight files are missing"
    elif damage == "index":
        index.unlink()  # then every *.safetensors counts
        file, status, words = index, Status.OK, "21 tensors in 2 files, found without an index"
    elif damage == "entry":
        places = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=places | {"lm_head.weight": "model-00001.safetensors"})
        file, status, words = index, Status.MISMATCH, "lm_head.weight is not in model-00001.safetensors"
    else:
        shutil.rmtree(folder)
        file, status, words = folder, Status.MISSING, "whole folder"
    finding = by_file(check(copy, only=["chat"]))[file.relative_to(copy).as_posix()]
    assert finding.status is status and words in finding.detail, finding
    assert finding.broken == (status is not Status.OK)


def test_where_the_root_is_looked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv(checkpoints.ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(checkpoints, "BUNDLED", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"--model-path.*STEPAUDIO_MODEL_PATH"):
        default_root()
    monkeypatch.setattr(checkpoints, "BUNDLED", tiny)
    assert default_root() == find_root() == tiny
    other = tmp_path / "other"
    (other / CHAT).mkdir(parents=True)
    monkeypatch.setenv(checkpoints.ROOT_VARIABLE, str(other))
    assert find_root() == other
    assert find_root(tiny) == tiny


@pytest.mark.parametrize(
    ("path", "words"), [("gone", "not a folder"), (".", "holds none of"), (f"root/{TTS}", "give its parent")]
)
def test_a_wrong_root_is_refused(tmp_path, path, words):
    (tmp_path / "root" / TTS).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=words):
        find_root(tmp_path / path)


def test_require_checkpoint_names_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=CHAT):
        require_checkpoint(tmp_path, "chat")
