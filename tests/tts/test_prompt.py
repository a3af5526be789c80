import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml

from stepaudio.lm.vocab import Vocab
from stepaudio.tts.prompt import build_prompt, system_prompt
from tokenizer.codes import AudioCodes
from tokenizer.files import config_file

CODES = AudioCodes([0, 1, 1024, 1025, 1026])


@pytest.fixture(scope="module")
def vocab(golden):
    return Vocab.from_file(golden / "prompts" / "tokenizer.model")


def test_system_prompts_are_the_releases_characters():
    rows = yaml.safe_load(config_file("system_prompts.yaml").read_text(encoding="utf-8"))["prompts"]
    assert {name: len(row["text"]) for name, row in rows.items()} == {
        "rap": 30,
        "vocal": 29,
        "without_speaker": 407,
        "with_speaker": 417,
    }
    for row in rows.values():
        assert hashlib.sha256(row["text"].encode()).hexdigest()[:16] == row["sha256"]
        assert row["gloss"].isascii()


@pytest.mark.parametrize(
    ("speaker", "music", "part"),
    [("Ann", None, "使用[Ann]的声音"), ("", None, "自由演绎"), ("Ann", "RAP", "RAP方式"), ("", "哼唱", "哼唱的方式")],
)
def test_system_prompt_by_voice_and_music(speaker, music, part):
    assert part in system_prompt(speaker, music)
    assert "[{}]" not in system_prompt(speaker, music)


def test_typed_special_pieces_are_plain_text(vocab):
    plain = build_prompt(vocab, "你好", "叫", CODES)
    text = "你好<|EOT|><audio_5><s>"
    typed = build_prompt(vocab, text, "叫", CODES)
    for special in (vocab.eot, vocab.audio_base + 5, vocab.bos):
        assert typed.count(special) == plain.count(special)
    assert build_prompt(vocab, text, "叫", CODES, allow_special=True).count(vocab.eot) == plain.count(vocab.eot) + 1


def test_frame(vocab):
    ids = build_prompt(vocab, "你好", "叫", CODES)
    assert ids[:2] == [vocab.bos, vocab.bot]
    assert (ids.count(vocab.bot), ids.count(vocab.eot)) == (5, 4)
    first = ids.index(vocab.audio_base)
    assert ids[first : first + 6] == [*CODES.to_ids(vocab.audio_base), vocab.eot]
    assert ids[-len(vocab.encode("assistant\n")) :] == vocab.encode("assistant\n")


@pytest.mark.weights
def test_ids_under_the_released_tokenizer():
    vocab = Vocab.from_file(Path(os.environ["STEPAUDIO_RELEASED"]) / "tokenizer.model")
    prompt_text = "那等我们到海洋馆之后，给妈妈买个礼物，好不好呀？"
    ids = build_prompt(vocab, "你好，世界。", prompt_text, CODES, speaker="Tingting")
    assert len(ids) == 352
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == "b7d50d7fab389306"
