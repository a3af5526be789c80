"""Text as recognisers are trained and judged on: lower-case words or Mandarin characters, no punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """Lower case; letters, digits, apostrophes and Mandarin characters stay, anything else becomes a space."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text)
    return " ".join(kept.split())


def is_chinese(text: str) -> bool:
    """True when a Mandarin character occurs."""
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def units(text: str) -> list[str]:
    """What an error rate counts: characters of a Mandarin sentence, else words."""
    text = plain(text)
    return [c for c in text if c != " "] if is_chinese(text) else text.split()


def edits(actual: Sequence[str], expected: Sequence[str]) -> int:
    """Least number of insertions, deletions and substitutions."""
    row = list(range(len(expected) + 1))
    for i, a in enumerate(actual, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(expected, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Word (Mandarin: character) error rate of (recognised, true) texts, all edits over all true units."""
    wrong = total = 0
    for actual, expected in pairs:
        wanted = units(expected)
        wrong += edits(units(actual), wanted)
        total += len(wanted)
    return wrong / max(1, total)


class Symbols:
    """CTC classes: 0 is the blank, then every symbol of the training material."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = list(symbols)
        self.index = {symbol: i + 1 for i, symbol in enumerate(self.symbols)}

    @classmethod
    def of(cls, said: Iterable[Sequence[str]]) -> Symbols:
        return cls(sorted({symbol for one in said for symbol in one}))

    def __len__(self) -> int:
        return len(self.symbols) + 1

    def encode(self, said: Sequence[str]) -> list[int]:
        return [self.index[symbol] for symbol in said if symbol in self.index]

    def decode(self, best: Sequence[int]) -> list[str]:
        """Greedy CTC: repeats merge, blanks vanish."""
        kept = [b for a, b in zip([0, *best], best) if b and b != a]
        return [self.symbols[i - 1] for i in kept]
