"""Ids to text, codes and calls."""

import pytest

from stepaudio.chat.messages import CallPart
from stepaudio.chat.output import OutputParser
from tests.chat.fakes import read_vocab
from tokenizer.codes import AudioCodes


@pytest.fixture(scope="module")
def vocab(golden):
    return read_vocab(golden)


def parse(vocab, ids):
    """Outputs with neighbouring texts joined, and the parser."""
    parser = OutputParser(vocab, (vocab.call_start, vocab.call_end))
    outputs = []
    for output in [*(item for index in ids for item in parser.push(index)), *parser.close()]:
        if isinstance(output, str) and outputs and isinstance(outputs[-1], str):
            outputs[-1] += output
        else:
            outputs.append(output)
    return outputs, parser


CODES = AudioCodes([1, 2, 1024, 1025, 1026])


@pytest.mark.parametrize(
    ("written", "outputs"),
    [
        ("", []),
        ("hello 你好 🙂", ["hello 你好 🙂"]),
        ("a<|BOT|>b<s></s>c", ["abc"]),
        ("<|CALL_START|>{}<|CALL_END|>", [CallPart("{}")]),
        ('wait <|CALL_START|> {"a": 1} <|CALL_END|>more', ["wait ", CallPart('{"a": 1}'), "more"]),
        ("<|CALL_START|>{}<|CALL_END|><|CALL_START|>[]<|CALL_END|>", [CallPart("{}"), CallPart("[]")]),
        ("<|CALL_START|>{<|CALL_START|>}", [CallPart("{}")]),
        ("<|CALL_END|>x", ["x"]),
        (CODES.to_text(), [CODES]),
        (f"a{CODES.to_text()}b{CODES.to_text()}", ["a", CODES, "b", CODES]),
        (f"{CODES.to_text()}<|CALL_START|>x<|CALL_END|>", [CODES, CallPart("x")]),
        ("bell\x07rings\n", ["bellrings\n"]),
    ],
)
def test_outputs(vocab, written, outputs):
    ids = vocab.encode(written, allow_special=True, bos=False, prefix=False)
    assert parse(vocab, ids)[0] == outputs


def test_text_comes_out_at_once(vocab):
    parser = OutputParser(vocab, (vocab.call_start, vocab.call_end))
    for index in vocab.encode("some words", bos=False, prefix=False):
        assert parser.push(index)


def test_a_character_cut_in_half_and_codes_out_of_use(vocab):
    smile = vocab.encode("🙂", bos=False, prefix=False)
    assert parse(vocab, smile[:-1])[0] == ["�"]
    last = vocab.audio_range[1] - 1
    outputs, parser = parse(vocab, [last])
    assert (outputs, parser.strays) == (([AudioCodes([5119])], 0) if last - vocab.audio_base < 5120 else ([], 1))
