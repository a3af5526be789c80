"""What a checkpoint is asked: held-out wordings, held-out recordings, voices of people it never heard.

Knows texts and files, no models. "Unseen" is taken at its word: a sentence that any training text equals is not
asked, and a speaker with a single training clip is no stranger. Needs the settings the checkpoint was trained with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stepaudio.train.data import COPY, Source
from stepaudio.train.domain import Dialogue
from stepaudio.train.nano_data import NanoData
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.text import plain
from tokenizer.audio import TOKENIZER_RATE, Audio, read_audio, resample

PROMPT_SECONDS = (2.0, 8.0)  # of a voice prompt; a longer clip without text is cut
TOOLS = tuple(tool.name for tool in nano_tools())


@dataclass(frozen=True, eq=False)
class Stranger:
    """A voice prompt of an unseen speaker; `text` is None where nobody wrote it down, `again` more of the voice."""

    speaker: str
    audio: Audio
    text: str | None
    again: Audio | None

    @property
    def part(self) -> str:
        """The recorded set: strangers of one set share its microphone and format."""
        return self.speaker.split("/")[0]


class Exam:
    """Draws the questions. `limit` caps the number of items of every figure, `speech` holds the recorded sets."""

    def __init__(self, configs: Path, speech: Path | None, limit: int | None = None, seed: int = 1) -> None:
        self.data = NanoData.from_files(configs / "data.yaml", configs / "domain.yaml")
        self.settings = self.data.settings
        self.speech, self.limit, self.seed = speech, limit, seed

    def count(self, wanted: int) -> int:
        return wanted if self.limit is None else min(wanted, self.limit)

    @cached_property
    def _recordings(self) -> list[Source]:
        """Every recording of the sets that were trained on, with its split."""
        assert self.speech is not None
        return list(self.data.recordings(self.speech))

    @cached_property
    def trained_texts(self) -> set[str]:
        """Plain texts that training heard, spoke or read."""
        recordings = self._recordings if self.speech is not None else []
        first = [one for one in recordings if one.text and one.split == "train" and COPY not in one.id]
        open_texts = [(plain(one.text), one.language) for one in first]
        dialogues = self.data.dialogues()
        texts = {plain(one.text) for one in self.data.lines(dialogues, open_texts) if one.split != "test"}
        texts |= {plain(one.text) for one in recordings if one.split != "test"}
        return texts | {plain(turn.text) for one in dialogues if one.split == "train" for turn in one.dialogue.turns}

    def dialogues(self, wanted: int, keep: Callable[[Dialogue], bool] = lambda one: True) -> list[Dialogue]:
        """Dialogues asked in held-out wordings, all different, up to `wanted`; fewer where there are no more."""
        rng = random.Random(self.seed)
        found: dict[tuple[str, ...], Dialogue] = {}
        for _ in range(100 * wanted):
            if len(found) >= self.count(wanted):
                break
            one = self.data.domain.draw(rng, "test")
            if keep(one) and plain(one.question) not in self.trained_texts:
                found.setdefault(tuple(turn.text for turn in one.turns if turn.role == "human"), one)
        return list(found.values())

    def sentences(self, wanted: int, language: str) -> list[str]:
        """Held-out questions without letters that are spelled one by one."""
        asked = self.dialogues(
            wanted, lambda one: one.language == language and one.intent != "memory" and not spelled(one.question)
        )
        return [one.question for one in asked]

    def held_out_clips(self) -> dict[str, list[Source]]:
        """Recordings kept for tests that have a text, by set; AN4 has its official ones."""
        found: dict[str, list[Source]] = {}
        for one in self._recordings:
            if one.split == "test" and one.text:
                found.setdefault(one.id.split("/")[0], []).append(one)
        rng = random.Random(self.seed)
        return {name: rng.sample(clips, self.count(len(clips))) for name, clips in found.items()}

    def strangers(self, wanted: int) -> list[Stranger]:
        """Voice prompts of speakers without any training clip, in turns through the speakers.

        A name counts as known whatever set it is in: sets of one origin share their speakers.
        """
        known = {name_of(one) for one in self._recordings if one.split != "test"}
        clips: dict[str, list[Source]] = {}
        for one in self._recordings:
            if one.language == "en" and name_of(one) not in known:
                clips.setdefault(one.speaker, []).append(one)
        rng = random.Random(self.seed)
        speakers = sorted(clips)
        rng.shuffle(speakers)
        for members in clips.values():
            rng.shuffle(members)
        found: list[Stranger] = []
        for turn in range(max(map(len, clips.values()), default=0)):
            for speaker in speakers:
                if len(found) < self.count(wanted) and turn < len(clips[speaker]):
                    found += stranger(clips[speaker], turn)
        return found


def stranger(clips: Sequence[Source], at: int) -> list[Stranger]:
    """The clip as a prompt, with another clip or its own rest to compare with; nothing if it is too short."""
    shortest, longest = (round(seconds * TOKENIZER_RATE) for seconds in PROMPT_SECONDS)
    one = clips[at]
    samples = resample(read_audio(one.file), TOKENIZER_RATE).samples
    if len(samples) < shortest or (one.text and len(samples) > longest):
        return []
    head, rest = samples[: longest - shortest], samples[longest - shortest :]
    if one.text:
        head, rest = samples, samples[:0]
    if len(clips) > 1:
        rest = resample(read_audio(clips[(at + 1) % len(clips)].file), TOKENIZER_RATE).samples
    again = Audio(rest, TOKENIZER_RATE) if len(rest) >= TOKENIZER_RATE else None
    return [Stranger(one.speaker, Audio(head, TOKENIZER_RATE), plain(one.text) or None, again)]


def name_of(one: Source) -> str:
    """The speaker without the set and the mark of a copy."""
    return one.speaker.split("/", 1)[-1].split(COPY)[0]


def spelled(text: str) -> bool:
    """Whether letters are named one by one in it, as in `it is spelled c a t`."""
    return sum(len(word) == 1 and word.isascii() and word not in "aio" for word in plain(text).split()) > 1
