import sys
import types

import pytest

from stepaudio.tts import text as module
from stepaudio.tts.text import MAX_CHARACTERS, language, normalize, speech_seconds, validate
from tokenizer.errors import RequestError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("……！？。", "nothing to say"),
        ("😀", "nothing to say"),
        ("a" * 100_000, "100,000 characters, at most 20,000"),
        ("ab\ud800c", r"surrogate pair \(U\+D800\) at position 2"),
        ("a\x00b", r"control character \(U\+0000\)"),
        ("a\x1b[0m", r"U\+001B"),
        (None, "must be a string"),
    ],
)
def test_refused(text, message):
    with pytest.raises(RequestError, match=message):
        validate(text)


@pytest.mark.parametrize("text", ["你好", "5", "a\r\nb\tc", "<|EOT|><audio_5>", "한국어", "é" * MAX_CHARACTERS])
def test_accepted(text):
    assert validate(text) == text


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("The quick brown fox jumps over the lazy dog near the river bank.", 3.0, 6.0),
        ("今天天气很好，我们一起去公园散步吧。", 2.5, 5.0),
        ("今日は天気がいいですね。", 1.0, 3.0),
        ("!" * 5000 + "a", 0.1, 0.5),
    ],
)
def test_estimated_duration(text, low, high):
    assert low < speech_seconds(text) < high


@pytest.mark.parametrize(("text", "expected"), [("Hi 你好", "zh"), ("これは本", "ja"), ("Hello", "en"), ("123", "en")])
def test_language(text, expected):
    assert language(text) == expected


def test_normalize_without_wetext_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)
    module._normalizer.cache_clear()
    with pytest.raises(RequestError, match="pip install wetext"):
        normalize("12")


def test_normalize_goes_line_by_line_with_the_language_of_the_text(monkeypatch):
    class Normalizer:
        def __init__(self, lang, operator):
            self.mark = f"{lang}-{operator}:"

        def normalize(self, line):
            return self.mark + line.replace('"', '\\"')

    monkeypatch.setitem(sys.modules, "wetext", types.SimpleNamespace(Normalizer=Normalizer))
    module._normalizer.cache_clear()
    assert normalize('say "12"\n\nb') == 'en-tn:say "12"\n\nen-tn:b'
    assert normalize("12 元") == "zh-tn:12 元"
    module._normalizer.cache_clear()
