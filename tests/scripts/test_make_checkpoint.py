"""Random checkpoints: the release's layout, files that load, models that behave, all or nothing."""

import hashlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from cosyvoice.config import CosyVoiceConfig, read_config
from cosyvoice.flow import FlowRequest, TokenToMel, num_frames
from cosyvoice.hift import HiFTVocoder, SourceDraws
from stepaudio import make_checkpoint as package
from stepaudio.checkpoints import CHECKPOINTS, FLOW_DIR
from stepaudio.export.decoder_files import yaml_text
from stepaudio.export.lm_files import _plan, whole, write_lm_config, write_shards
from stepaudio.export.vocabulary import build_vocabulary
from stepaudio.lm.base import SamplingParams, StopReason
from stepaudio.lm.local import LocalLM
from stepaudio.lm.vocab import Vocab
from stepaudio.make_checkpoint import make_checkpoint
from stepaudio.make_checkpoint.presets import PRESETS
from stepaudio.make_checkpoint.text_pieces import whole_text
from tokenizer.audio import read_audio, resample
from tokenizer.codes import LAYOUT
from tokenizer.errors import RequestError
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.semantic import SemanticTokenizer

REPO = Path(__file__).parents[2]
TOKENIZER, TTS, CHAT = CHECKPOINTS["tokenizer"], CHECKPOINTS["tts"], CHECKPOINTS["chat"]


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(tiny, tmp_path):
    again = digests(make_checkpoint(tmp_path / "again", "tiny", seed=0))
    assert again == digests(tiny)
    assert sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file()) < 15e6


def test_another_seed_and_a_part_of_the_checkpoint(tiny, tmp_path):
    made = digests(make_checkpoint(tmp_path / "part", "tiny", seed=1, only=["chat"]))
    assert {name.split("/")[0] for name in made} == {CHAT}
    weights = f"{CHAT}/model-00001.safetensors"
    assert made[weights] != digests(tiny)[weights]


def test_codes_vary_and_the_vocoder_has_a_pitch(tiny):
    clip = resample(read_audio(REPO / "tests/golden/wavs/clip1_16k.wav"), 16000).samples
    linguistic = LinguisticTokenizer.from_dir(tiny / TOKENIZER).encode([clip])[0]
    semantic = SemanticTokenizer.from_file(tiny / TOKENIZER / "speech_tokenizer_v1.onnx").encode([clip])[0]
    assert len(set(linguistic.tolist())) > 0.4 * len(linguistic)
    assert len(set(semantic.tolist())) > 0.4 * len(semantic)

    folder = tiny / TTS / FLOW_DIR
    config = read_config(folder)
    flow = TokenToMel.from_file(folder / "flow.pt", config.flow)
    vocoder = HiFTVocoder.from_file(folder / "hift.pt", config.hift)
    codes = torch.from_numpy(np.concatenate([linguistic[:20], semantic[:30] + LAYOUT.linguistic_size]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(80, num_frames(len(codes), config.flow), generator=generator)
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 80)
    with torch.inference_mode():
        mel = flow.generate([FlowRequest(codes, *nothing, torch.randn(192, generator=generator), noise)])[0]
        sound = vocoder(mel[None], SourceDraws.draw(config.hift, mel.shape[1], generator))
    assert mel.min() > -12 and mel.max() < 3
    assert sound.f0.min() > 60 and sound.f0.max() < 300
    assert sound.wav.isfinite().all() and 0.005 < sound.wav.std() < 0.3


@pytest.mark.parametrize(("folder", "audio"), [(TTS, True), (CHAT, False)])
def test_replies_end_and_are_of_one_kind(tiny, folder, audio):
    vocab = Vocab.from_file(tiny / folder)
    lm = LocalLM.from_dir(tiny / folder, dtype=torch.float32)
    prompt = vocab.encode("<|BOT|>human\n你好<|EOT|><|BOT|>assistant\n", allow_special=True)
    params = [SamplingParams(seed=seed, stop_ids=(vocab.eot,), max_new_tokens=500) for seed in range(4)]
    replies = lm.generate([prompt] * 4, params)
    assert all(reply.stop is StopReason.STOP for reply in replies)
    ids = [index for reply in replies for index in reply.ids]
    first, end = vocab.audio_range
    assert ids and all(first <= index < end if audio else vocab.is_text(index) for index in ids)


def test_full_vocabulary_has_the_release_ids():
    model = build_vocabulary(whole_text(), num_audio=9216, audio_base=65536)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    ids = {
        0: "<unk>",
        **{1: "<s>", 3: "<|EOT|>", 4: "<|BOT|>", 5: "<|CALL_START|>", 13: "<im_patch>", 19: "<|MASK_1e69f|>"},
        **{25: "<|SEP_1e69f|>", 30: "<user_defined_symbol_26>", 31: "<audio_start>", 35: "<|TTS|>"},
        **{67: "<user_defined_symbol_63>", 78: "<0x0A>", 324: "▁", 65536: "<audio_0>", 74751: "<audio_9215>"},
    }
    assert {index: processor.id_to_piece(index) for index in ids} == ids
    controls = [index for index in range(74752) if processor.is_control(index)]
    assert controls == [*range(1, 19), *range(21, 25), *range(31, 39)]
    assert processor.decode(processor.encode("Hello, 世界! 🎉 ça va?")) == "Hello, 世界! 🎉 ça va?"


def test_text_that_does_not_reach_the_audio_base_is_refused():
    with pytest.raises(RequestError, match="were to begin at 65536"):
        build_vocabulary({"a": -1.0}, audio_base=65536)


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_is_read_back_as_written(tmp_path, preset):
    config = PRESETS[preset]().decoder
    (tmp_path / "cosyvoice.yaml").write_text(yaml_text(config))
    assert read_config(tmp_path) == config
    assert (preset == "full") == (config == CosyVoiceConfig())


def test_full_size_language_models(tmp_path):
    """Bytes of config.json and sizes of the shards as released (formats.md 1.2, 1.3)."""
    preset = PRESETS["full"]()
    for geometry, size, shards in ((preset.chat, 516, 27), (preset.tts, 514, 1)):
        write_lm_config(tmp_path, geometry)
        assert (tmp_path / "config.json").stat().st_size == size
        plan = list(_plan(geometry.weight_shapes(), torch.bfloat16, preset.shard_bytes))
        assert abs(len(plan) - shards) <= 2


def test_shards_are_safetensors(tmp_path):
    tensors = {f"t{n}": torch.randn(n + 1, 3) for n in range(5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    counts = []
    write_shards(tmp_path, shapes, whole(tensors), torch.float32, shard_bytes=60, written=counts.append)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(counts) == 4 * 3 * 15
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))


def test_nothing_is_left_of_a_failed_run(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(package, "write_semantic", fail)
    with pytest.raises(OSError, match="No space"):
        make_checkpoint(tmp_path / "out", "tiny", only=["tokenizer"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [({"preset": "huge"}, "'huge'"), ({"only": ["asr"]}, "asr"), ({"only": []}, "no checkpoint"), ({"seed": -1}, "-1")],
)
def test_unknown_names_are_refused(tmp_path, options, words):
    with pytest.raises(RequestError, match=words):
        make_checkpoint(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["make_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "scripts" / "make_checkpoint.py"), run_name="__main__")
    return ended.value.code


def test_the_script_makes_what_is_asked_for(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "--out", tmp_path / "new" / "out", "--only", "chat") == 0
    assert capsys.readouterr().out.endswith("1.5 MB\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_the_script_refuses_a_folder_in_use(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert run_script(monkeypatch, "--out", tmp_path) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
