"""The codec script: what it writes, and every way its input can be wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio.checkpoints import ASR_DIR, FLOW_DIR, TOKENIZER_DIR, TTS_DIR
from tests.scripts.runner import message, run_script
from tokenizer.audio import read_audio

REPO = Path(__file__).resolve().parents[2]
FLOW = f"{TTS_DIR}/{FLOW_DIR}"


def roundtrip(root: Path, source: Path, target: Path, *more: object):
    return run_script(
        "codec_roundtrip.py",
        *("--model-path", root, "--input", source, "--output", target, "--device", "cpu", "--steps", 2, *more),
    )


def test_a_clip_goes_through(tiny, golden, tmp_path):
    ended = roundtrip(tiny, golden / "wavs/clip0_22k.wav", tmp_path / "out.wav", "--codes", tmp_path / "codes.json")
    assert ended.code == 0, ended.err
    written = json.loads((tmp_path / "codes.json").read_text())
    assert written["linguistic"] * 3 == written["semantic"] * 2 > 0
    sound = read_audio(tmp_path / "out.wav")
    assert sound.sample_rate == 22050
    assert len(sound) == 256 * int(len(written["codes"]) / 41.667 * 22050 / 256)
    assert float(np.abs(sound.samples).max()) > 1e-3
    for word in ("linguistic", "tokenize", "flow", "vocoder", "RTF"):
        assert word in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.json", "out.wav"]


def test_the_same_seed_gives_the_same_bytes(tiny, golden, tmp_path):
    clip = golden / "wavs/clip1_16k.wav"
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert roundtrip(tiny, clip, tmp_path / f"{name}.wav", "--seed", seed).code == 0
    a, b, c = ((tmp_path / f"{name}.wav").read_bytes() for name in "abc")
    assert a == b != c


def test_codes_that_break_the_pattern_are_decoded_with_a_warning(tiny, tmp_path, caplog):
    codes = tmp_path / "codes.json"
    codes.write_text(json.dumps([1030, 5, 6, 1031, 1032] * 10))
    assert roundtrip(tiny, codes, tmp_path / "out.wav").code == 0
    assert any("2:3" in record.getMessage() for record in caplog.records)
    assert len(read_audio(tmp_path / "out.wav")) == 256 * int(50 / 41.667 * 22050 / 256)


def sound(path: Path, samples: np.ndarray, rate: int = 16000, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def truncated(path: Path) -> Path:
    sound(path, np.zeros(16000), subtype="PCM_16")
    path.write_bytes(path.read_bytes()[:9000])
    return path


def unknown_codec(path: Path) -> Path:
    data = bytes(2000)
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 0x7777, 1, 16000, 32000, 2, 16)
    path.write_bytes(head + struct.pack("<4sI", b"data", len(data)) + data)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


BAD_INPUT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda d: d / "gone.wav", "does not exist"),
    "folder": (lambda d: folder(d / "folder.wav"), "folder"),
    "text named wav": (lambda d: text(d / "text.wav", "hello " * 100), "no sound file"),
    "empty file": (lambda d: text(d / "empty.wav", ""), "0 bytes"),
    "no samples": (lambda d: sound(d / "none.wav", np.zeros(0)), "0 samples"),
    "10 ms": (lambda d: sound(d / "short.wav", np.ones(160) * 0.1), "10 ms"),
    "NaN": (lambda d: sound(d / "nan.wav", np.full(16000, np.nan)), "NaN"),
    "Inf": (lambda d: sound(d / "inf.wav", np.full(16000, np.inf)), "infinite"),
    "truncated": (lambda d: truncated(d / "cut.wav"), "truncated"),
    "unknown codec": (lambda d: unknown_codec(d / "codec.wav"), "no sound file"),
    "rate too low": (lambda d: sound(d / "low.wav", np.ones(4000) * 0.1, 4000), "4000 Hz"),
    "code out of range": (lambda d: text(d / "codes.json", "[0, 1, 5120]"), "5120"),
    "negative code": (lambda d: text(d / "codes.json", "[-1, 1, 2]"), "-1"),
    "huge code": (lambda d: text(d / "codes.json", f"[{10**30}]"), "whole numbers"),
    "code no number": (lambda d: text(d / "codes.json", '["a"]'), "whole numbers"),
    "no codes": (lambda d: text(d / "codes.json", "[]"), "no codes"),
    "broken json": (lambda d: text(d / "codes.json", "[1, 2"), "JSON"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, tiny, tmp_path):
    make, word = BAD_INPUT[case]
    target = folder(tmp_path / "out") / "out.wav"
    assert word in message(roundtrip(tiny, make(tmp_path), target, "--codes", target.with_suffix(".json")))
    assert list(target.parent.iterdir()) == []


@pytest.fixture
def root(tiny, tmp_path):
    """A copy of the checkpoint that a test may break."""
    shutil.copytree(tiny / TOKENIZER_DIR, tmp_path / "root" / TOKENIZER_DIR)
    shutil.copytree(tiny / FLOW, tmp_path / "root" / FLOW)
    return tmp_path / "root"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Bomb:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return os.system, ("touch pickle-ran",)


def replace_text(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def smaller_shape(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["input_embedding.weight"] = state["input_embedding.weight"][:-1].clone()
    torch.save(state, path)


def without_a_key(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["encoder_proj.bias"]
    torch.save(state, path)


BAD_CHECKPOINT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing flow.pt": (lambda r: (r / FLOW / "flow.pt").unlink(), "flow.pt"),
    "missing codebook": (
        lambda r: (r / TOKENIZER_DIR / "linguistic_tokenizer.npy").unlink(),
        "linguistic_tokenizer.npy",
    ),
    "missing tokenizer folder": (lambda r: shutil.rmtree(r / TOKENIZER_DIR), TOKENIZER_DIR),
    "missing speech folder": (lambda r: shutil.rmtree(r / TTS_DIR), TTS_DIR),
    "lfs pointer": (
        lambda r: (r / FLOW / "flow.pt").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "truncated flow.pt": (lambda r: cut(r / FLOW / "flow.pt"), "truncated"),
    "truncated hift.pt": (lambda r: cut(r / FLOW / "hift.pt"), "truncated"),
    "truncated model.pt": (lambda r: cut(r / TOKENIZER_DIR / ASR_DIR / "model.pt"), "truncated"),
    "truncated onnx": (lambda r: cut(r / TOKENIZER_DIR / "speech_tokenizer_v1.onnx"), "speech_tokenizer_v1.onnx"),
    "empty onnx": (lambda r: (r / TOKENIZER_DIR / "speech_tokenizer_v1.onnx").write_bytes(b""), "empty"),
    "truncated campplus": (lambda r: cut(r / FLOW / "campplus.onnx"), "campplus.onnx"),
    "pickle with code": (lambda r: torch.save({"a": Bomb()}, r / FLOW / "flow.pt"), "run code"),
    "unsupported structure": (
        lambda r: replace_text(r / FLOW / "cosyvoice.yaml", "use_cnn_module: False", "use_cnn_module: True"),
        "use_cnn_module",
    ),
    "unknown key in yaml": (
        lambda r: replace_text(r / FLOW / "cosyvoice.yaml", "    vocab_size:", "    extra_heads: 3\n    vocab_size:"),
        "extra_heads",
    ),
    "shape disagrees": (lambda r: smaller_shape(r / FLOW / "flow.pt"), "input_embedding.weight"),
    "key is missing": (lambda r: without_a_key(r / FLOW / "flow.pt"), "encoder_proj.bias"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINT)
def test_bad_checkpoint(case, root, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "here"))
    spoil, word = BAD_CHECKPOINT[case]
    spoil(root)
    target = folder(tmp_path / "out") / "out.wav"
    assert word in message(
        roundtrip(root, golden / "wavs/clip1_16k.wav", target, "--codes", target.with_suffix(".json"))
    )
    assert list(target.parent.iterdir()) == [] and list(Path().iterdir()) == []


def test_no_tag_of_the_yaml_is_executed(root, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "here"))
    path = root / FLOW / "cosyvoice.yaml"
    path.write_text(
        "__run: !apply:os.system ['touch yaml-ran']\n__seed: !apply:torch.manual_seed [1986]\n" + path.read_text()
    )
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert roundtrip(root, golden / "wavs/clip1_16k.wav", tmp_path / "out.wav").code == 0
    assert torch.equal(torch.rand(1), expected), "the global generator was touched"
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "options, word",
    [
        (["--model-path", "nowhere"], "nowhere"),
        (["--model-path", "."], TOKENIZER_DIR),
        (["--output", "gone/out.wav"], "create it first"),
        (["--output", "out.xyz"], ".xyz"),
        (["--output", "."], "unknown format"),
        (["--codes", "codes.txt"], ".txt"),
        (["--prompt", "gone.wav"], "gone.wav"),
        (["--steps", "0"], "num_steps"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float7"], "float7"),
    ],
)
def test_bad_options(options, word, tiny, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in message(roundtrip(tiny, golden / "wavs/clip1_16k.wav", tmp_path / "out.wav", *options))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_without_rights(tiny, golden, tmp_path, monkeypatch):
    """Rights do not bind the superuser, so the refusal is staged where the file would be made."""

    def refuse(**options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert "cannot write" in message(roundtrip(tiny, golden / "wavs/clip1_16k.wav", tmp_path / "out.wav"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tiny, golden, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    target = text(tmp_path / "out.wav", "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "disk full" in message(roundtrip(tiny, golden / "wavs/clip1_16k.wav", target))
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_as_a_process(tiny, tmp_path):
    """The same through a real process: exit code 2, two lines at most on standard error."""
    command = [sys.executable, REPO / "scripts/codec_roundtrip.py", "--model-path", tiny, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--input", "gone.wav", "--output", tmp_path / "o.wav"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "error: gone.wav does not exist\n"
