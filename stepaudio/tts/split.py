"""Long text into pieces of a speakable length, at sentence ends where there are any.

Knows the punctuation of Chinese, English and Japanese. Pieces joined give the text again, but for
spaces at the seams. Decimals, abbreviations, initials, URLs and numbered lists are not cut; a
quotation or a bracket is cut only when nothing outside it would do.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from itertools import accumulate

from stepaudio.tts.text import character_seconds, speakable

SENTENCE, CLAUSE, COMMA, SPACE = 4, 3, 2, 1  # how good a place is to cut
_SHORTEST = 0.25  # a cut earlier than this share of the limit is not looked for
_LONGEST_QUOTE = 200  # characters; cuts inside a longer quotation are as good as outside

_MARK = re.compile(r"""([。！？｡.!?]+|[…‥⋯]+|[；;：:]|[，,、]|—+|\s*\n\s*|\s+)(["'”’」』）)\]】》〉]*)""")
_PAIRS = {"（": "）", "(": ")", "「": "」", "『": "』", "“": "”", "《": "》", "【": "】", "[": "]", "〈": "〉"}
_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_WITH_STOP = (
    "mr mrs ms dr prof rev gen col capt lt sgt sen rep gov hon st sr jr vs etc eg ie cf al approx dept est fig figs "
    "inc ltd co corp no nos vol pp ed eds ph.d m.d u.s u.k u.n e.g i.e a.m p.m jan feb mar apr jun jul aug sep sept "
    "oct nov dec ave blvd rd mt ft tel ext"
)
_ABBREVIATIONS = frozenset(_WITH_STOP.split())


def split(text: str, max_seconds: float = 20.0) -> list[str]:
    """Cuts a text into pieces of about equal length, each estimated to take at most `max_seconds` to say.

    A sentence end is preferred, then a clause, a comma, a space; a run without any is cut hard.
    Every piece holds a letter or digit (a text without any comes back whole).
    """
    text = text.strip()
    clock = list(accumulate(character_seconds(text), initial=0.0))  # [n + 1] seconds before each position
    cuts = _cuts(text)
    pieces, start = [], 0
    while (left := clock[-1] - clock[start]) > max_seconds:
        limit = max(start + 1, bisect_right(clock, clock[start] + max_seconds + 1e-9) - 1)
        earliest = bisect_left(clock, clock[start] + _SHORTEST * max_seconds)
        target = clock[start] + left / -(-left // max_seconds)
        reach = cuts[bisect_left(cuts, (max(earliest, start + 1),)) : bisect_left(cuts, (limit + 1,))]
        best = max(reach, key=lambda cut: (cut[2], -abs(clock[cut[0]] - target)), default=None)
        end = best[1] if best else _hard_cut(text, start, max(start + 1, min(limit, bisect_left(clock, target))))
        pieces.append(text[start:end])
        start = end
    return _merge_unspeakable([*pieces, text[start:]])


def finished(text: str) -> int:
    """How many characters of a text that still grows are whole sentences, by their end marks and what follows them."""
    return max((end for _, end, level in _cuts(text) if level == SENTENCE and text[end:].strip()), default=0)


def _hard_cut(text: str, start: int, limit: int) -> int:
    """A cut near `limit` that leaves accents and emoji sequences whole and no mark at the head of the rest."""
    while limit > start + 1 and (
        unicodedata.category(text[limit]) in ("Mn", "Me", "Cf") or text[limit - 1] == "\u200d"
    ):
        limit -= 1
    while limit < len(text) and unicodedata.category(text[limit]) in ("Po", "Pe", "Pf"):
        limit += 1
    return limit


def _merge_unspeakable(pieces: list[str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and not (speakable(piece) and speakable(merged[-1])):
            merged[-1] += piece
        else:
            merged.append(piece)
    return [piece.strip() for piece in merged]


def _cuts(text: str) -> list[tuple[int, int, int]]:
    """Where the text may be cut: begin of the mark, position behind it, level; in order."""
    inside = bytearray(len(text) + 1)
    for begin, end in _quotations(text):
        if end - begin <= _LONGEST_QUOTE:
            inside[begin + 1 : end + 1] = b"\1" * (end - begin)
    found = []
    for match in _MARK.finditer(text):
        level = _level(text, match)
        if level:
            found.append((match.start(), match.end(), min(level, COMMA) if inside[match.end()] else level))
    return found


def _level(text: str, match: re.Match[str]) -> int:
    mark, behind = match[1], text[match.end() : match.end() + 1]
    if mark.isspace():
        after_title = text[match.start() - 1] == "." and _is_abbreviation(text, match.start() - 1)
        return SENTENCE if "\n" in mark else 0 if after_title else SPACE
    if match[2].endswith(("」", "』")) and behind in ("と", "っ"):  # the quotation goes on as "..., said"
        return COMMA
    if set(mark) & set("。！？｡"):
        return SENTENCE
    if mark[0] in "…‥⋯；：":
        return CLAUSE
    if mark[0] in "，、—":
        return COMMA
    if behind and not behind.isspace() and not _WIDE.match(behind):
        return 0  # 3.14, 1,000, 12:30, example.com/?q=1
    if mark in (",", ";", ":"):
        return COMMA if mark == "," else CLAUSE
    return _level_of_stop(text, match)


def _level_of_stop(text: str, match: re.Match[str]) -> int:
    """A run of . ! ? with a space behind: sentence end, pause, or part of a word."""
    mark = match[1]
    if mark == "." and _is_abbreviation(text, match.start()):
        return 0
    if text[match.end() :].lstrip()[:1].islower():
        return COMMA if match[2] else 0 if mark == "." else CLAUSE
    return CLAUSE if mark.startswith("..") and not set(mark) & set("!?") else SENTENCE


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the stop at `stop` belongs to `Dr.`, `U.S.`, `J.` or the number of a list item."""
    line = text[max(0, stop - 40) : stop]
    word = re.search(r"[\w.]*$", line)[0]  # type: ignore[index]
    if word.isdigit():
        before = line[: len(line) - len(word)].rstrip(" \t")
        return len(word) <= 2 and (not before or before[-1] in "\n.!?。！？")
    return word.lower() in _ABBREVIATIONS or bool(re.fullmatch(r"(?:[A-Za-z]\.)*[A-Z]", word) and word != "I")


def _quotations(text: str) -> list[tuple[int, int]]:
    """Positions of matched brackets and quotation marks: (opening, closing)."""
    spans, open_marks = [], []
    for at, char in enumerate(text):
        if char == "\n":
            open_marks.clear()
        elif open_marks and char == open_marks[-1][0]:
            spans.append((open_marks.pop()[1], at))
        elif char == '"' or char in _PAIRS:
            open_marks.append((_PAIRS.get(char, '"'), at))
    return spans
