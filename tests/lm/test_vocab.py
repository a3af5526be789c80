"""Text and ids: the recorded cases, user text that looks special, odd characters, broken files."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from stepaudio.lm.vocab import TextStream, Vocab
from tokenizer.errors import CheckpointError, RequestError

SPECIAL_TEXTS = ["<|EOT|>", "<|BOT|>", "<audio_5>", "<s>", "</s>", "<unk>", "<|CALL_START|>", "<|MASK_1e69f|>"]
RELEASED = Path(os.environ.get("STEPAUDIO_RELEASED", "."))


@pytest.fixture(scope="module")
def vocab(golden):
    return Vocab.from_file(golden / "prompts")


@pytest.fixture(scope="module")
def plain(golden):
    """The same pieces under the release's rules: `<s>` in front, a word mark on the first segment only."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((golden / "prompts" / "tokenizer.model").read_bytes())
    return Vocab(model)


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "prompts" / "golden.json").read_text(encoding="utf-8"))


def test_recorded_chat_ids(vocab, recorded):
    cases = [case for case in recorded["chat"] if "text" in case]
    assert len(cases) >= 10
    for case in cases:
        assert vocab.encode(case["text"], allow_special=True) == case["ids"], case["text"]


def test_recorded_decoding(vocab, recorded):
    for case in recorded["decode"]:
        assert vocab.encode(case["text"], allow_special=True) == case["ids"]
        assert vocab.decode(case["ids"], skip_special=False) == case["decoded_fast"]


def test_ids_by_piece(vocab):
    assert (vocab.pad, vocab.bos, vocab.eot, vocab.bot) == (0, 1, 3, 4)
    assert (vocab.call_start, vocab.call_end) == (5, 6)
    assert vocab.audio_base == vocab.id_of("<audio_0>") == 65536
    assert vocab.audio_range == (65536, 65536 + 5120)
    assert vocab.size == 70656
    with pytest.raises(CheckpointError, match="no piece '<nothing>'"):
        vocab.id_of("<nothing>")


def test_rules_come_from_the_config_beside_the_model(golden, tmp_path):
    shutil.copy(golden / "prompts" / "tokenizer.model", tmp_path)
    release = Vocab.from_file(tmp_path)
    assert release.add_bos and not release.mark_every_segment
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    release = Vocab.from_file(tmp_path / "tokenizer.model")
    assert release.add_bos and not release.mark_every_segment
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    older = Vocab.from_file(tmp_path)
    assert not older.add_bos and older.mark_every_segment


def test_word_mark_and_bos(plain, vocab):
    start = plain.encode("human\n")
    assert start[0] == plain.bos and plain.encode("human\n", bos=False) == start[1:]
    after = plain.encode("<|BOT|>human\n", allow_special=True)
    assert after == [plain.bos, plain.bot, *plain.encode("human\n", bos=False, prefix=False)]
    assert after[2:] != start[1:]
    assert plain.encode("<|BOT|> human\n", allow_special=True) == [plain.bos, plain.bot, *start[1:]]
    assert vocab.encode("<|BOT|>human\n", allow_special=True) == [vocab.bot, *start[1:]]  # marks every segment
    assert plain.encode("") == [plain.bos] and plain.encode("", bos=False) == []


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_text_of_a_user_is_plain_text(plain, text):
    typed = f"a{text}b {text}"
    ids = plain.encode(typed, bos=False)
    assert all(plain.is_text(index) for index in ids)
    assert plain.decode(ids) == typed
    assert plain.specials[text] in plain.encode(typed, allow_special=True)


def test_no_special_id_in_random_user_text(plain):
    rng = random.Random(0)
    bits = [*SPECIAL_TEXTS, "<audio_", "7>", "<", "|>", " ", "  ", "\n", "你好", "hello", "👼🏽", "\0", "\x1b[0m", "é"]
    for _ in range(500):
        text = "x" + "".join(rng.choice(bits) for _ in range(rng.randrange(12)))
        ids = plain.encode(text, bos=False)
        assert all(plain.is_text(index) for index in ids), text
        assert plain.decode(ids) == text
        assert [plain.bos, *ids] == plain.encode(text)


def test_unknown_audio_piece_is_text(plain):
    ids = plain.encode("<audio_99999><audio_05>", allow_special=True, bos=False)
    assert all(plain.is_text(index) for index in ids)


@pytest.mark.parametrize(
    "text", ["\0a\0b", "a\x07\r\n\t\x1b", "👼🏽‍♀️", "𠮷野家", "\ufeffx", "", "。。。", "a" * 100_000, "你好 " * 50_000]
)
def test_odd_text_survives(plain, text):
    assert plain.decode(plain.encode(text)) == text


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00"])
def test_lone_surrogate_is_refused(plain, text):
    with pytest.raises(RequestError, match="surrogate"):
        plain.encode(text)


def test_join_equals_the_text_written_out(plain, vocab):
    for v in (plain, vocab):
        parts = [v.bot, "system\n", "你好 there", v.eot, [v.bot], "human\n", [v.audio_base, v.audio_base + 9], v.eot]
        text = "<|BOT|>system\n你好 there<|EOT|><|BOT|>human\n<audio_0><audio_9><|EOT|>"
        assert v.join(parts) == v.encode(text, allow_special=True)
        assert v.join(["hi there", v.eot]) == v.encode("hi there<|EOT|>", allow_special=True)
        assert v.join(["<|EOT|>"], bos=False) == v.encode("<|EOT|>", bos=False)


def test_stream_equals_decode(plain):
    ids = plain.encode("héllo 你好 👼🏽 <|EOT|>", allow_special=True)
    for skip in (True, False):
        stream = TextStream(plain, skip_special=skip)
        pieces = [stream.push(index) for index in ids]
        assert "".join([*pieces, stream.close()]) == plain.decode(ids, skip_special=skip)
        assert not any("�" in piece for piece in pieces)


def test_half_a_character(plain):
    first, *_ = plain.encode("𠮷", bos=False, prefix=False)
    stream = TextStream(plain)
    assert stream.push(first) == "" and stream.close() == "�"
    assert plain.decode([first, *plain.encode("a", bos=False, prefix=False)]) == "�a"


def test_skip_special_drops_audio_and_control(plain):
    ids = [plain.bos, plain.bot, *plain.encode("hi", bos=False), plain.audio_base, plain.eot]
    assert plain.decode(ids) == "hi"
    assert plain.decode(ids, skip_special=False) == "<s><|BOT|> hi<audio_0><|EOT|>"
    with pytest.raises(CheckpointError, match="do not belong together"):
        plain.decode([plain.size])


def _without(model, *pieces):
    kept = [piece for piece in model.pieces if piece.piece not in pieces]
    del model.pieces[:]
    model.pieces.extend(kept)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("<|EOT|>", "no piece '<|EOT|>'"),
        ("<audio_5119>", "5119 audio pieces"),
        ("<0x41>", "byte piece <0x41>"),
    ],
)
def test_foreign_model_is_refused(plain, piece, message):
    model = sentencepiece_model_pb2.ModelProto()
    model.CopyFrom(plain.model)
    _without(model, piece)
    with pytest.raises(CheckpointError) as error:
        Vocab(model)
    assert message in str(error.value)


def test_audio_ids_must_be_in_order(plain):
    model = sentencepiece_model_pb2.ModelProto()
    model.CopyFrom(plain.model)
    at = plain.audio_base
    model.pieces[at + 7].piece, model.pieces[at + 8].piece = "<audio_8>", "<audio_7>"
    with pytest.raises(CheckpointError, match="<audio_7> should have the id 65543, has 65544"):
        Vocab(model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "missing"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"not a model at all", "not a sentencepiece model"),
    ],
)
def test_broken_file(tmp_path, data, message):
    if data is not None:
        (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Vocab.from_file(tmp_path)


def test_truncated_file(golden, tmp_path):
    data = (golden / "prompts" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        Vocab.from_file(tmp_path)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("\n", [1, 324, 78]),
        ("human\n", [1, 4623, 78]),
        ("assistant\n", [1, 15886, 78]),
        ("system\n你好", [1, 2323, 78, 1027, 922]),
        ("<|BOT|>human\n你好<|EOT|><|BOT|>assistant\n", [1, 4, 28504, 78, 1027, 922, 3, 4, 56446, 78]),
        ("<|BOT|> human\n", [1, 4, 4623, 78]),
    ],
)
def test_release_ids(text, ids):
    assert Vocab.from_file(RELEASED / "tokenizer.model").encode(text, allow_special=True) == ids


@pytest.mark.weights
def test_release_prompt(recorded):
    """The 352 ids of formats.md section 11, laid out as in 4.5."""
    vocab = Vocab.from_file(RELEASED / "tokenizer.model")
    system = recorded["system_prompts"]["sys_prompt_with_spk"].format("Tingting")
    spoken = [1214, 413, 1133, 472, 4687, 2281, 1064, 325, 1051, 16551, 3954, 534, 23957, 325, 922, 12791, 19393, 1216]
    words = vocab.decode(spoken)
    assert vocab.encode(words, bos=False, prefix=False) == spoken
    text = vocab.encode("你好，世界。", bos=False, prefix=False)
    assert text == [1027, 922, 325, 982, 330]
    human, assistant = vocab.encode("human\n"), vocab.encode("assistant\n")
    ids = [1, 4, *vocab.encode("system\n" + system), 3, 4, *human, *spoken, 3, 4, *assistant]
    ids += [65536, 65537, 66560, 66561, 66562, 3, 4, *human, *text, 3, 4, *assistant]
    assert len(ids) == 352
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == "b7d50d7fab389306"
