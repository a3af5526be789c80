"""What every part of an evaluation works with: the questions, the processes, the sounds that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepaudio.eval import judges, work
from stepaudio.eval.crew import Crew
from stepaudio.eval.exam import Exam
from stepaudio.eval.store import Store, Take
from stepaudio.train.synth import Line
from stepaudio.train.text import error_rate
from stepaudio.tts.speech import TTSRequest
from tokenizer.audio import Audio

_BATCH = 8  # items that a process takes at a time


@dataclass(frozen=True)
class Desk:
    """`mark` is the hash of the checkpoint: its sounds are not those of another."""

    exam: Exam
    crew: Crew
    store: Store
    mark: str

    def teacher(self, lines: Sequence[Line]) -> list[Take | None]:
        """Lines by the synthesisers."""
        return self.store.fill(
            "teacher",
            [repr(line) for line in lines],
            lambda at: self.crew.map(work.teach, [lines[i] for i in at], "teacher", 1),
        )

    def speech(self, requests: Sequence[TTSRequest], what: str) -> list[Take | None]:
        """Our speech."""
        setup, place = self.crew.setup, str(self.store.folder)
        return self.store.fill(
            f"{self.mark}-speech",
            [f"{request} attempts {setup.attempts}".replace(place, "") for request in requests],
            lambda at: self.crew.map(work.speak, [requests[i] for i in at], what, _BATCH),
        )

    def recoded(self, items: Sequence[work.Recoding], keys: Sequence[str], what: str) -> list[Take | None]:
        """Sounds through codes and back; `keys` say which sounds they are."""
        return self.store.fill(
            f"{self.mark}-codec",
            keys,
            lambda at: self.crew.map(work.recode, [items[i] for i in at], what, _BATCH),
        )

    def vocoded(self, sounds: Sequence[Audio], keys: Sequence[str], what: str) -> list[Take | None]:
        """Sounds through true mel and vocoder."""
        return self.store.fill(
            f"{self.mark}-vocoder",
            keys,
            lambda at: self.crew.map(work.vocode, [sounds[i] for i in at], what, _BATCH),
        )

    def own(self, sounds: Sequence[Audio], texts: Sequence[str]) -> float:
        """Error rate of our own recognition."""
        return error_rate(zip(self.crew.map(work.hear, sounds, "own recognition", 2 * _BATCH), texts))

    def outside(self, sounds: Sequence[Audio], texts: Sequence[str]) -> float:
        """Error rate of pocketsphinx."""
        heard = self.crew.map(judges.sphinx, sounds, "pocketsphinx", 2)
        return error_rate(zip(heard, map(judges.british, texts)))

    def mos(self, sounds: Sequence[Audio]) -> dict[str, float]:
        """Mean DNSMOS."""
        rows = self.crew.map(judges.mos, sounds, "DNSMOS", 4)
        return {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}

    def manners(self, sounds: Sequence[Audio]) -> list[judges.Manner]:
        return self.crew.map(judges.manner, sounds, "pitch", 4)


def both(*columns: Sequence[Take | None]) -> list[int]:
    """Places where every column has a sound: only these are compared."""
    return [i for i, takes in enumerate(zip(*columns)) if all(take is not None for take in takes)]


def sounds_at(takes: Sequence[Take | None], places: Sequence[int]) -> list[Audio]:
    """The sounds at these places."""
    found = [takes[i] for i in places]
    return [take.audio for take in found if take is not None]


def seconds(sounds: Sequence[Audio]) -> float:
    """Of all sounds together."""
    return sum(sound.seconds for sound in sounds)
