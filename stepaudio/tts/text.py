"""Text before it is spoken: what is refused, how long it will take to say, numbers as words.

Knows nothing of tags, voices or models; splitting is in `split.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tokenizer.errors import RequestError

MAX_CHARACTERS = 20_000  # over an hour of Mandarin
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

# Seconds a character takes at an unhurried reading pace
_IDEOGRAPH, _KANA, _HANGUL = 0.22, 0.14, 0.19
_LETTER, _DIGIT, _SPACE, _MARK, _SYMBOL = 0.07, 0.3, 0.03, 0.15, 0.4


def validate(text: str) -> str:
    """Returns the text if it can be spoken.

    Raises RequestError if it is not a string, empty, without a letter or digit, longer than
    20,000 characters, or holds half a surrogate pair or a control character.
    """
    if not isinstance(text, str):
        raise RequestError(f"the text must be a string, not {type(text).__name__}")
    if not text.strip():
        raise RequestError("the text is empty: give the words to speak")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"the text has {len(text):,} characters, at most {MAX_CHARACTERS:,} are spoken in one request: "
            "cut it into several (rows of --input-jsonl)"
        )
    for at, char in enumerate(text):
        kind = unicodedata.category(char)
        if kind == "Cs" or (kind == "Cc" and char not in "\n\r\t"):
            what = "half a surrogate pair" if kind == "Cs" else "a control character"
            raise RequestError(f"the text holds {what} (U+{ord(char):04X}) at position {at}: remove it")
    if not speakable(text):
        raise RequestError(f"the text {text.strip()[:20]!r} holds nothing to say: give letters or digits")
    return text


def speakable(text: str) -> bool:
    """Whether there is a letter or digit of any script in it."""
    return any(unicodedata.category(char)[0] in "LN" for char in text)


def language(text: str) -> str:
    """`zh`, `ja` or `en`, by script."""
    if re.search(r"[\u3040-\u30ff]", text):
        return "ja"
    return "zh" if _CJK.search(text) else "en"


def speech_seconds(text: str) -> float:
    """Rough time it takes to say the text; within a factor of two for plain zh, ja, ko and en."""
    return sum(character_seconds(text))


def character_seconds(text: str) -> Iterator[float]:
    """One estimate per character; a repeated space or mark adds nothing."""
    previous = ""
    for char in text:
        yield 0.0 if char == previous and not char.isalnum() else _seconds(char)
        previous = char


@lru_cache(maxsize=8192)
def _seconds(char: str) -> float:
    kind = unicodedata.category(char)
    if char.isspace():
        return _SPACE
    if kind[0] == "N":
        return _DIGIT
    if kind[0] == "L":
        if _CJK.match(char):
            return _IDEOGRAPH
        return _KANA if "\u3040" <= char <= "\u30ff" else _HANGUL if "\uac00" <= char <= "\ud7a3" else _LETTER
    return {"P": _MARK, "S": _SYMBOL}.get(kind[0], 0.0)


def normalize(text: str) -> str:
    """Numbers, dates, units and currency written out as words; Chinese or English rules by script.

    Works line by line. Raises RequestError if the optional package `wetext` is not installed.
    """
    spoken = _normalizer("en" if language(text) == "en" else "zh")
    lines = [spoken.normalize(line).replace('\\"', '"') if line.strip() else line for line in text.split("\n")]
    return "\n".join(lines)


@lru_cache(maxsize=2)
def _normalizer(lang: str) -> Any:
    try:
        from wetext import Normalizer
    except ImportError as error:
        raise RequestError(f"--normalize needs the package wetext ({error}): pip install wetext") from None
    return Normalizer(lang=lang, operator="tn")
