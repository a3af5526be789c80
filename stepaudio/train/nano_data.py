"""Everything nano is trained and judged on: dialogues, the lines that speak them, and recorded speech.

Writes a corpus folder (see `data.py`) plus `dialogues.jsonl`. The same seed gives the same lines.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from stepaudio.train.data import COPY, Corpus, Source, recorded, write_corpus
from stepaudio.train.domain import Dialogue, Domain, Turn, number
from stepaudio.train.synth import Line
from stepaudio.train.text import plain
from tokenizer.files import make_folder


@dataclass(frozen=True)
class Spoken:
    """One dialogue with its split, as a line of dialogues.jsonl."""

    split: str
    dialogue: Dialogue


class NanoData:
    """Draws dialogues and lines from the settings of configs/train/nano/data.yaml."""

    def __init__(self, settings: dict[str, Any], domain: Domain) -> None:
        self.settings = settings
        self.domain = domain
        self.named = {
            language: [voice for voice in settings["voices"][language] if voice in settings["named"].values()]
            for language in settings["voices"]
        }

    @classmethod
    def from_files(cls, settings: Path, domain: Path) -> NanoData:
        return cls(yaml.safe_load(settings.read_text(encoding="utf-8")), Domain.from_file(domain))

    def dialogues(self) -> list[Spoken]:
        """Training dialogues, then test dialogues with wordings that training never has."""
        rng = random.Random(self.settings["seed"])
        train = [Spoken("train", self.domain.draw(rng, "train")) for _ in range(self.settings["dialogues"])]
        return train + [Spoken("test", self.domain.draw(rng, "test")) for _ in range(self.settings["test_dialogues"])]

    def lines(self, dialogues: list[Spoken], open_texts: list[tuple[str, str]]) -> Iterator[Source]:
        """Every distinct sentence of the dialogues, and open text, each by a drawn voice."""
        rng = random.Random(self.settings["seed"] + 1)
        seen: set[tuple[str, str]] = set()
        known: dict[str, list[str]] = {language: [] for language in self.settings["voices"]}
        for spoken in dialogues:
            for turn in spoken.dialogue.turns:
                key = (turn.text, spoken.split)
                if turn.call or turn.role == "tool" or key in seen:
                    continue
                seen.add(key)
                if spoken.split == "train":
                    known[spoken.dialogue.language].append(turn.text)
                yield from self._speak(rng, turn.text, spoken.dialogue.language, spoken.split, turn.role)
        short = [(text, language) for text, language in open_texts if len(text) <= self.settings["longest_open"]]
        for text, language in rng.sample(short, min(len(short), self.settings["open_lines"])):
            yield from self._speak(rng, text, language, "train", "open")
            known[language].append(text)
        for _ in range(self.settings["alphabet_lines"]):
            yield from self._speak(rng, alphabet(rng), "en", "train", "open")
        for language, texts in known.items():
            for _ in range(self.settings["spliced_lines"][language]):
                yield from self._speak(rng, splice(rng, texts, language), language, "train", "open")

    def _speak(self, rng: random.Random, text: str, language: str, split: str, role: str) -> Iterator[Source]:
        if split == "test":
            named = rng.choice(self.named[language])
            yield source(f"test-{role}", text, language, "test", Line(text, named))
            yield source(f"held-{role}", text, language, "test", Line(text, self.settings["held_out"][language]))
            return
        for _ in range(2 if role != "open" and len(plain(text)) < 40 else 1):
            line = self._line(rng, text, language)
            yield source(f"train-{role}", text, language, "train", line)
            if rng.random() < self.settings["noisy_share"]:
                yield noisy(source(f"train-{role}", text, language, "train", line), rng.randrange(2**31))

    def _line(self, rng: random.Random, text: str, language: str) -> Line:
        if rng.random() < self.settings["named_share"]:
            voice = rng.choice(self.named[language])
            if rng.random() < self.settings["styled_share"]:
                return Line(text, voice, **rng.choice(list(self.settings["styles"].values())))
            return Line(text, voice)
        others = [voice for voice in self.settings["voices"][language] if voice not in self.named[language]]
        variants = self.settings["variants"]
        return Line(text, rng.choice(others), rng.choice(variants["rate"]), rng.choice(variants["pitch"]))

    def recordings(self, speech: Path) -> Iterator[Source]:
        """The recorded sets, with a share of each kept for tests, and copies at other speeds."""
        for name in self.settings["recorded"]:
            rng = random.Random(name)
            share = self.settings["test_share"].get(name, 0.0)
            for one in recorded(speech / name, name):
                one = replace(one, split="test") if rng.random() < share else one
                yield one
                if one.split == "train":
                    copies = [at_speed(one, speed) for speed in self.settings["copies"].get(name, ())]
                    yield from copies
                    for _ in range(self.settings["noisy_copies"].get(name, 0)):
                        yield noisy(rng.choice([one, *copies]), rng.randrange(2**31))


def source(kind: str, text: str, language: str, split: str, line: Line) -> Source:
    """A spoken line; the speaker's name holds voice, rate and pitch, the id all of it."""
    speaker = f"{line.voice}@{line.rate:g}x{line.pitch:g}"
    return Source(f"{kind}/{speaker}/{text}", text, f"{kind.split('-')[0]}/{speaker}", language, split, line=line)


def at_speed(one: Source, speed: float) -> Source:
    """A copy of a recording that is played faster."""
    mark = f"{COPY}{speed:g}"
    return replace(one, id=one.id + mark, speaker=one.speaker + mark, speed=speed)


def noisy(one: Source, seed: int) -> Source:
    """The same speech heard in a room, for the parts that listen."""
    return replace(one, id=f"{one.id}{COPY}room{seed}", split="noisy", room=seed)


def splice(rng: random.Random, texts: list[str], language: str) -> str:
    """The head of one sentence and the tail of another: known words in an order that nobody expects."""
    first, second = (plain(rng.choice(texts)) for _ in range(2))
    if language == "zh":
        return first[: rng.randint(1, max(1, len(first) - 1))] + second[rng.randint(0, len(second) // 2) :]
    first_words, second_words = first.split(), second.split()
    head = first_words[: rng.randint(1, min(6, max(1, len(first_words) - 1)))]
    return " ".join(head + second_words[-rng.randint(1, min(6, len(second_words))) :])


def alphabet(rng: random.Random) -> str:
    """Letters, digits, numbers and dates as people dictate them."""
    kind = rng.randrange(4)
    if kind == 0:
        return " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
    if kind == 1:
        return " ".join(number(rng.randint(0, 9), "en") for _ in range(rng.randint(2, 7)))
    if kind == 2:
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 4))
        return " ".join([*letters, *(number(rng.randint(0, 99), "en") for _ in range(rng.randint(1, 3)))])
    month, day, year = rng.choice(MONTHS), rng.choice(DAYS), rng.randint(10, 99)
    return f"{month} {day} nineteen {number(year, 'en')}"


MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905
DAYS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth""".split()  # noqa: SIM905
DAYS += [f"twenty {day}" for day in DAYS[:9]] + ["thirty first"]


def build(data: NanoData, speech: Path, folder: Path, workers: int) -> Corpus:
    """Writes dialogues and corpus into `folder`; nothing is done twice if they are there."""
    if (folder / "clips.jsonl").exists():
        return Corpus.open(folder)
    make_folder(folder)
    dialogues = data.dialogues()
    text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in dialogues)
    (folder / "dialogues.jsonl").write_text(text, encoding="utf-8")
    recordings = list(data.recordings(speech))
    spoken = [one for one in recordings if one.text and one.split == "train" and one.speed == 1]
    texts = [(plain(one.text), one.language) for one in spoken]
    return write_corpus(folder, [*recordings, *data.lines(dialogues, texts)], workers)


def read_dialogues(folder: Path, split: str) -> list[Dialogue]:
    """The dialogues of a split of a corpus folder."""
    rows = [json.loads(line) for line in (folder / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Dialogue(**{**row["dialogue"], "turns": tuple(Turn(**turn) for turn in row["dialogue"]["turns"])})
        for row in rows
        if row["split"] == split
    ]
