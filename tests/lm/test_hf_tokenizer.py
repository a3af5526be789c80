"""tokenizer.json: the same ids as Vocab through AutoTokenizer, and the verdict on a folder."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from stepaudio.lm.hf_tokenizer import build, compare, write_tokenizer_json
from stepaudio.lm.vocab import Vocab
from tokenizer.errors import CheckpointError

BITS = [
    *("hello", " world", "  ", "\n", "\t", "你好", "，", "。", "世界天气", "123", "4567.89", "human", "assistant\n"),
    *("<|BOT|>", "<|EOT|>", "<audio_5>", "<audio_1024><audio_5119>", "<audio_99999>", "<s>", "</s>", "<unk>"),
    *(
        "▁",
        "é",
        "日本語",
        "한국어",
        "👼🏽",
        "♀️",
        "\0",
        "\x07",
        "<",
        "|>",
        "(RAP)",
        "（高兴1）",
        "don't",
        "Привет",
        "\r\n",
    ),
    *("aaaaaaa", "<|CALL_START|>", '{"a": 1}', "𠮷", "\ufeff", "\xa0", "　", "!!!", "<audio_", "<|MASK_1e69f|>"),
]


def mixed_texts(count):
    rng = random.Random(0)

    def bit():
        if rng.random() < 0.85:
            return rng.choice(BITS)
        low, high = rng.choice([(32, 127), (0x4E00, 0x9FFF), (0xA0, 0x2FFF), (0x10000, 0x1FFFF)])
        return chr(rng.randrange(low, high))

    return ["".join(bit() for _ in range(rng.randrange(30))) for _ in range(count)]


def unigram(folder):
    """A small unigram model of the same pieces; scores by length and chance."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    kept = [piece for piece in model.pieces if piece.type != piece.UNUSED]
    del model.pieces[:]
    model.pieces.extend(kept)
    rng = random.Random(1)
    for piece in model.pieces:
        if piece.type == piece.NORMAL:
            piece.score = -3 - 2 * rng.random() - 3 * len(piece.piece) ** 0.5
    return model


def convert(source, folder):
    write_tokenizer_json(source, folder)
    return Vocab.from_file(source), AutoTokenizer.from_pretrained(str(folder))


def assert_equal(vocab, auto, texts):
    expected = [vocab.encode(text, allow_special=True) for text in texts]
    assert auto(texts)["input_ids"] == expected
    for ids in expected[::20]:
        assert auto.decode(ids) == vocab.decode(ids, skip_special=False)


def test_bpe_with_recorded_rules(golden, tmp_path):
    vocab, auto = convert(golden / "prompts", tmp_path)
    assert_equal(vocab, auto, mixed_texts(2000))


def test_unigram_with_release_rules(golden, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(unigram(golden / "prompts").SerializeToString())
    assert "run `stepaudio convert-tokenizer" in compare(tmp_path)
    vocab, auto = convert(tmp_path, tmp_path)
    assert compare(tmp_path) == "AutoTokenizer gives the right ids (tokenizer.json)"
    assert_equal(vocab, auto, mixed_texts(2000))
    again = Vocab.from_file(tmp_path)  # the config written beside it keeps the rules
    assert again.add_bos and not again.mark_every_segment


def test_config_keeps_what_it_had(golden, tmp_path):
    shutil.copytree(golden / "prompts", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ 1 }}"}))
    write_tokenizer_json(tmp_path / "model", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ 1 }}" and written["model_max_length"] == 32768
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("change", ["spaces", "kind"])
def test_models_it_cannot_express(golden, change):
    model = unigram(golden / "prompts")
    if change == "spaces":
        model.normalizer_spec.remove_extra_whitespaces = True
    vocab = Vocab(model)
    if change == "kind":
        vocab.model.trainer_spec.model_type = model.trainer_spec.CHAR
    with pytest.raises(CheckpointError):
        build(vocab)


@pytest.mark.weights
def test_release_file(tmp_path):
    shutil.copy(Path(os.environ["STEPAUDIO_RELEASED"]) / "tokenizer.model", tmp_path)
    vocab, auto = convert(tmp_path, tmp_path)
    assert_equal(vocab, auto, mixed_texts(2000))
