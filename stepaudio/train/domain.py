"""The bounded world of the nano model as dialogues: drawn from a table of facts and wordings.

Knows text only. The last quarter of every list of wordings is held out of training, so a test asks
known facts in words never seen. Source of the facts: configs/train/nano/domain.yaml.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "zh")
_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen""".split()  # noqa: SIM905
_TENS = """- - twenty thirty forty fifty sixty seventy eighty ninety""".split()  # noqa: SIM905
_DIGITS = "零一二三四五六七八九"


@dataclass(frozen=True)
class Turn:
    """One turn: role `human`, `assistant` or `tool`; an assistant turn may be a tool call instead of speech."""

    role: str
    text: str
    call: bool = False


@dataclass(frozen=True)
class Dialogue:
    """Turns that end with the answer; `key` must occur in a right answer."""

    intent: str
    language: str
    turns: tuple[Turn, ...]
    key: str

    @property
    def question(self) -> str:
        return next(turn.text for turn in reversed(self.turns) if turn.role == "human")


def number(value: int, language: str) -> str:
    """0 to 100 (English) or 0 to 9,999 (Mandarin) in words."""
    if language == "zh":
        return _chinese_number(value)
    if value < 20:
        return _ONES[value]
    if value < 100:
        return _TENS[value // 10] + (f" {_ONES[value % 10]}" if value % 10 else "")
    assert value == 100, value
    return "one hundred"


def _chinese_number(value: int) -> str:
    if value < 10:
        return _DIGITS[value]
    for size, name in ((1000, "千"), (100, "百"), (10, "十")):
        if value >= size:
            head, rest = divmod(value, size)
            text = ("" if size == 10 and head == 1 and value < 20 else _DIGITS[head]) + name
            if rest:
                text += ("零" if rest < size // 10 else "") + _chinese_number(rest)
            return text
    raise AssertionError(value)


class Domain:
    """Draws dialogues. `split` is `train` or `test` and chooses the wordings of the questions."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table
        self._makers: dict[str, Callable[[random.Random, str, str], Dialogue | None]] = {
            **{f"fact-{name}": self._fact(name) for name in table["facts"]},
            "greeting": self._greeting,
            "memory": self._memory,
            "spell": self._spell,
            "repeat": self._repeat,
            "plus": self._arithmetic("plus"),
            "minus": self._arithmetic("minus"),
            "days": self._order("days"),
            "months": self._order("months"),
            "story": self._story,
            "weather": self._weather,
            "timer": self._timer,
            "calculator": self._calculator,
            "unknown": self._unknown,
        }

    @classmethod
    def from_file(cls, path: Path) -> Domain:
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")))

    @property
    def intents(self) -> tuple[str, ...]:
        return tuple(self._makers)

    def draw(
        self, rng: random.Random, split: str = "train", language: str | None = None, intent: str | None = None
    ) -> Dialogue:
        """One random dialogue; an intent that a language does not have is drawn again."""
        while True:
            where = language or rng.choices(LANGUAGES, (0.6, 0.4))[0]
            made = self._makers[intent or rng.choice(self.intents)](rng, where, split)
            if made is not None:
                return made
            language = None if intent else language

    def _fact(self, name: str) -> Callable[[random.Random, str, str], Dialogue]:
        def make(rng: random.Random, language: str, split: str) -> Dialogue:
            entry = self.table["facts"][name][language]
            a, b = rng.choice(list(entry["pairs"].items()))
            ask = wording(rng, entry["ask"], split).format(a=a)
            return dialogue(f"fact-{name}", language, ask, entry["answer"].format(a=a, b=b), b)

        return make

    def _greeting(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = rng.choice(self.table["greetings"][language])
        return dialogue("greeting", language, wording(rng, entry["ask"], split), entry["answer"], entry["key"])

    def _memory(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = self.table["names"][language]
        name = rng.choice(entry["pool"])
        turns = [
            Turn("human", wording(rng, entry["tell"], split).format(a=name)),
            Turn("assistant", entry["told"].format(a=name)),
        ]
        if rng.random() < 0.5:
            turns += self._greeting(rng, language, "train").turns
        turns += [
            Turn("human", wording(rng, entry["ask"], split)),
            Turn("assistant", entry["answer"].format(a=name)),
        ]
        return Dialogue("memory", language, tuple(turns), name)

    def _spell(self, rng: random.Random, language: str, split: str) -> Dialogue | None:
        if language == "zh":
            return None
        entry = self.table["spell"]
        word = rng.choice(entry["words"])
        letters = " ".join(word)
        ask = wording(rng, entry["ask"], split).format(a=word)
        return dialogue("spell", language, ask, entry["answer"].format(a=word, b=letters), letters)

    def _repeat(self, rng: random.Random, language: str, split: str) -> Dialogue:
        phrase = rng.choice(self.table["repeat"]["phrases"][language])
        ask = wording(rng, self.table["repeat"][language], split).format(a=phrase)
        return dialogue("repeat", language, ask, phrase, phrase)

    def _arithmetic(self, kind: str) -> Callable[[random.Random, str, str], Dialogue]:
        def make(rng: random.Random, language: str, split: str) -> Dialogue:
            entry = self.table["arithmetic"][language]
            total = rng.randint(2, 100)
            part = rng.randint(1, total - 1)
            a, b, c = (part, total - part, total) if kind == "plus" else (total, part, total - part)
            words = {"a": number(a, language), "b": number(b, language), "c": number(c, language)}
            spoken = {"en": kind, "zh": {"plus": "加", "minus": "减"}[kind]}[language]
            ask = wording(rng, entry[kind], split).format(**words)
            return dialogue(kind, language, ask, entry["answer"].format(op=spoken, **words), words["c"])

        return make

    def _order(self, kind: str) -> Callable[[random.Random, str, str], Dialogue]:
        def make(rng: random.Random, language: str, split: str) -> Dialogue:
            entry = self.table["order"][kind][language]
            at = rng.randrange(len(entry["list"]))
            a, b = entry["list"][at], entry["list"][(at + 1) % len(entry["list"])]
            ask = wording(rng, entry["ask"], split).format(a=a)
            return dialogue(kind, language, ask, entry["answer"].format(a=a, b=b), b)

        return make

    def _story(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = rng.choice(self.table["stories"][language])
        return dialogue("story", language, wording(rng, entry["ask"], split), entry["answer"], entry["key"])

    def _weather(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = self.table["tools"]["weather"]
        place, weather = rng.choice(entry["places"][language]), rng.choice(entry["results"][language])
        ask = wording(rng, entry[language]["ask"], split).format(a=place)
        answer = entry[language]["answer"].format(a=place, b=weather)
        return tool_dialogue("weather", language, ask, {"place": place}, weather, answer, weather)

    def _timer(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = self.table["tools"]["timer"][language]
        minutes = rng.randint(1, 60)
        spoken = number(minutes, language)
        ask = wording(rng, entry["ask"], split).format(a=spoken)
        return tool_dialogue(
            "timer", language, ask, {"minutes": minutes}, "ok", entry["answer"].format(a=spoken), spoken
        )

    def _calculator(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = self.table["tools"]["calculator"][language]
        a = rng.randint(2, 10)
        b = rng.randint(2, 10)
        words = {"a": number(a, language), "b": number(b, language), "c": number(a * b, language)}
        ask = wording(rng, entry["ask"], split).format(**words)
        call = {"expression": f"{a}*{b}"}
        result = str(a * b)
        return tool_dialogue("calculator", language, ask, call, result, entry["answer"].format(**words), words["c"])

    def _unknown(self, rng: random.Random, language: str, split: str) -> Dialogue:
        entry = self.table["unknown"][language]
        if split == "train" and rng.random() < 0.8:
            words = {name: rng.choice(choices) for name, choices in entry["words"].items()}
            asked = rng.choice(entry["patterns"]).format(**words)
            return dialogue("unknown", language, asked, entry["answer"], entry["key"])
        return dialogue("unknown", language, wording(rng, entry["ask"], split), entry["answer"], entry["key"])


def wording(rng: random.Random, choices: Sequence[str], split: str) -> str:
    """A wording of the split: the last quarter of a list (at least one) is for tests."""
    assert split in ("train", "test"), split
    held = max(1, len(choices) // 4)
    return rng.choice(choices[-held:] if split == "test" else choices[:-held])


def dialogue(intent: str, language: str, ask: str, answer: str, key: str) -> Dialogue:
    """One question, one answer."""
    return Dialogue(intent, language, (Turn("human", ask), Turn("assistant", answer)), key)


def tool_dialogue(
    name: str, language: str, ask: str, arguments: dict[str, Any], result: str, answer: str, key: str
) -> Dialogue:
    """A question answered through one call: call, result, answer."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    turns = (Turn("human", ask), Turn("assistant", call, call=True), Turn("tool", result), Turn("assistant", answer))
    return Dialogue(name, language, turns, key)
