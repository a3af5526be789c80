"""The byte arithmetic of the released models, placements, and bad options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.plan import GB, main, make_plan, parse_gpus
from tokenizer.errors import CheckpointError, RequestError

CHAT = {"hidden_size": 12288, "intermediate_size": 31232, "num_attention_heads": 96, "num_attention_groups": 8}
CHAT |= {"num_hidden_layers": 88, "vocab_size": 74752, "max_seq_len": 32768, "model_type": "step1"}
TTS = CHAT | {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 48, "num_attention_groups": 4}
TTS |= {"num_hidden_layers": 32}


def folder_of(path: Path, config: dict) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "config, parameters, weights, cache, tensors, head_dim",
    [
        (CHAT, 131_946_590_208, 263_893_180_416, 360_448, 795, 128),
        (TTS, 3_529_706_496, 7_059_412_992, 32_768, 291, 64),
    ],
)
def test_the_released_sizes_to_the_byte(
    config: dict, parameters: int, weights: int, cache: int, tensors: int, head_dim: int
) -> None:
    geometry = Geometry.from_config(config)
    assert geometry.parameters == parameters
    assert geometry.parameters * 2 == weights
    assert geometry.cache_bytes(2) == cache
    assert len(geometry.weight_shapes()) == tensors
    assert geometry.head_dim == head_dim


def test_shapes_of_the_3b_model_equal_the_manifest(golden: Path) -> None:
    manifest = json.loads((golden / "manifests" / "step1_3b.json").read_text(encoding="utf-8"))
    expected = {name: tuple(shape) for name, shape in manifest.items() if not name.startswith("_")}
    assert Geometry.from_config(TTS).weight_shapes() == expected


def test_the_130b_model_on_four_cards_of_80() -> None:
    plan = make_plan(Geometry.from_config(CHAT), [80 * GB] * 4)
    assert plan.fits and plan.weight_bytes == 263_893_180_416 and plan.cache_bytes == 360_448
    assert sum(gpu.weight_bytes for gpu in plan.gpus) == plan.weight_bytes
    assert sum(gpu.cache_bytes for gpu in plan.gpus) == plan.cache_bytes
    for gpu in plan.gpus:
        assert gpu.weight_bytes + plan.room * gpu.cache_bytes + plan.reserve <= gpu.capacity
        assert 1e9 * 13 < gpu.capacity - gpu.weight_bytes < 1e9 * 15
    assert any(gpu.weight_bytes + (plan.room + 1) * gpu.cache_bytes + plan.reserve > gpu.capacity for gpu in plan.gpus)
    places = list(plan.device_map.values())
    assert len(places) == 91 and places == sorted(places)  # running order: a token crosses each border once
    assert plan.device_map["model.embed_tokens"] == 0 and plan.device_map["lm_head"] == 3


@pytest.mark.parametrize(
    "config, gpus, context, fits, room",
    [
        (TTS, "1x24", 8192, True, 455_950),
        (TTS, "1x10", 32768, False, 28_704),
        (CHAT, "3x80", 8192, False, 0),
        (CHAT, "2x141", 8192, True, 39_136),
        (TTS, "1x1", 8192, False, 0),
    ],
)
def test_what_fits(config: dict, gpus: str, context: int, fits: bool, room: int) -> None:
    plan = make_plan(Geometry.from_config(config), parse_gpus(gpus), context=context)
    assert (plan.fits, plan.room) == (fits, room)
    assert set(plan.device_map) == set(Geometry.from_config(config).parts())


def test_command_prints_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "Step-Audio-Chat", CHAT)
    assert main(["--model-path", str(folder), "--gpus", "4x80"]) == 0
    text = capsys.readouterr().out
    assert "131,946,590,208 parameters" in text and "263.9 GB of weights" in text and "360,448 bytes" in text
    assert "embedding, layers 0-21" in text and "layers 66-87, norm, lm_head" in text and "\nfits: room for" in text
    assert main(["--model-path", str(folder), "--gpus", "2x80,1x48", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["weight_bytes"] == 263_893_180_416 and row["kv_bytes_per_token"] == 360_448
    assert row["fits"] is False and row["device_map"]["lm_head"] == "cpu"


def test_as_a_command_bad_input_exits_with_2(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", TTS)
    command = [sys.executable, "-m", "stepaudio.lm.plan", "--model-path", str(folder), "--gpus"]
    done = subprocess.run([*command, "lots"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --gpus 'lots' is not understood")
    assert len(done.stderr.splitlines()) <= 2
    done = subprocess.run([*command, "1x24"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("gpus", ["", "4", "x80", "0x80", "4x", "4x0", "-4x80", "4x80GB", "4 80", "5000x80", "4x80,,"])
def test_bad_gpus(gpus: str) -> None:
    with pytest.raises(RequestError, match="NUMBERxGB"):
        parse_gpus(gpus)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dtype", "int2"], "--dtype 'int2' must be one of bf16, fp16, fp32"),
        (["--context", "0"], "--context 0 is outside 1 to 32768"),
        (["--context", "40000"], "outside 1 to 32768"),
        (["--reserve", "-1"], "--reserve -1.0 is outside 0"),
        (["--reserve", "nan"], "--reserve nan is outside 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    folder = folder_of(tmp_path / "model", TTS)
    with pytest.raises(RequestError, match=message):
        main(["--model-path", str(folder), "--gpus", "1x24", *options])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json is missing"),
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[]", "model_type is 'list'"),
        (json.dumps({"model_type": "llama"}), "model_type is 'llama'"),
        (json.dumps({k: v for k, v in TTS.items() if k != "vocab_size"}), "lacks vocab_size"),
        (json.dumps(TTS | {"hidden_size": "3072"}), "hidden_size is '3072'"),
        (json.dumps(TTS | {"hidden_size": 3073}), "must be a multiple of num_attention_heads"),
        (json.dumps(TTS | {"num_attention_groups": 5}), "multiple of num_attention_groups 5"),
        (json.dumps(TTS | {"num_hidden_layers": 0}), "num_hidden_layers is 0"),
        (json.dumps(TTS | {"num_hidden_layers": True}), "num_hidden_layers is True"),
    ],
)
def test_broken_configs(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Geometry.from_config(read_config(tmp_path))
