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
from stepaudio.train.domain import Dialogue, Domain, Turn
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
        for spoken in dialogues:
            for turn in spoken.dialogue.turns:
                key = (turn.text, spoken.split)
                if turn.call or turn.role == "tool" or key in seen:
                    continue
                seen.add(key)
                yield from self._speak(rng, turn.text, spoken.dialogue.language, spoken.split, turn.role)
        for text, language in rng.sample(open_texts, min(len(open_texts), self.settings["open_lines"])):
            yield from self._speak(rng, text, language, "train", "open")

    def _speak(self, rng: random.Random, text: str, language: str, split: str, role: str) -> Iterator[Source]:
        if split == "test":
            named = rng.choice(self.named[language])
            yield source(f"test-{role}", text, language, "test", Line(text, named))
            yield source(f"held-{role}", text, language, "test", Line(text, self.settings["held_out"][language]))
            return
        for _ in range(2 if len(plain(text)) < 40 else 1):
            yield source(f"train-{role}", text, language, "train", self._line(rng, text, language))

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
                    yield from (at_speed(one, speed) for speed in self.settings["copies"].get(name, ()))


def source(kind: str, text: str, language: str, split: str, line: Line) -> Source:
    """A spoken line; the speaker's name holds voice, rate and pitch, the id all of it."""
    speaker = f"{line.voice}@{line.rate:g}x{line.pitch:g}"
    return Source(f"{kind}/{speaker}/{text}", text, f"{kind.split('-')[0]}/{speaker}", language, split, line=line)


def at_speed(one: Source, speed: float) -> Source:
    """A copy of a recording that is played faster."""
    mark = f"{COPY}{speed:g}"
    return replace(one, id=one.id + mark, speaker=one.speaker + mark, speed=speed)


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
