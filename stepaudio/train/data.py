"""Speech for training: one flat array of 16 kHz samples and a list of what lies where.

A corpus folder holds `samples.npy` (int16, all clips end to end) and `clips.jsonl` (one `Clip` a line).
It is made from folders with a `transcripts.tsv` (columns id, file, text, speaker, lang, split, seconds)
and from lines spoken by synthesisers; decoding happens once, afterwards the array is memory-mapped.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stepaudio.train.phones import available, phones
from stepaudio.train.rooms import in_a_room
from stepaudio.train.synth import Line, speak
from stepaudio.train.text import plain
from tokenizer.audio import TOKENIZER_RATE, Audio, read_audio, resample
from tokenizer.errors import RequestError
from tokenizer.files import make_folder

logger = logging.getLogger(__name__)
COPY = "~"  # between a speaker's name and the speed of a copy: a faster copy is another, higher voice


@dataclass(frozen=True)
class Clip:
    """A stretch of a corpus: `samples[start : start + length]`, what is said, by whom."""

    id: str
    text: str
    speaker: str
    language: str  # en or zh
    split: str  # train, noisy (for training as well, but only to listen to) or test
    start: int
    length: int
    phones: str = ""  # what is said as phones, separated by spaces; empty where nothing is known of them

    @property
    def seconds(self) -> float:
        return self.length / TOKENIZER_RATE


class Corpus:
    """Clips with their samples. `sound(clip)` is float32 in -1..1."""

    def __init__(self, samples: np.ndarray, clips: Sequence[Clip]) -> None:
        self.samples = samples
        self.clips = list(clips)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        if not (folder / "clips.jsonl").is_file():
            raise RequestError(f"{folder} holds no corpus (clips.jsonl): make it with --stage data")
        lines = (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(np.load(folder / "samples.npy", mmap_mode="r"), [Clip(**json.loads(line)) for line in lines])

    def sound(self, clip: Clip) -> np.ndarray:
        return self.samples[clip.start : clip.start + clip.length].astype(np.float32) / 32768.0

    def select(self, keep: Callable[[Clip], bool]) -> Corpus:
        """The clips for which `keep` is true, over the same samples."""
        return Corpus(self.samples, [clip for clip in self.clips if keep(clip)])

    @property
    def hours(self) -> float:
        return sum(clip.seconds for clip in self.clips) / 3600

    def __len__(self) -> int:
        return len(self.clips)


@dataclass(frozen=True)
class Source:
    """A clip that is not decoded yet: a file to read or a line to speak."""

    id: str
    text: str
    speaker: str
    language: str
    split: str
    file: str = ""
    line: Line | None = None
    speed: float = 1.0  # a file is played so much faster, pitch and all
    room: int | None = None  # seed of a room with echoes and noise that it is heard in


def recorded(folder: Path, prefix: str) -> Iterator[Source]:
    """The clips of a folder with a transcripts.tsv; speakers get `prefix/` in front of their name."""
    table = folder / "transcripts.tsv"
    if not table.is_file():
        raise RequestError(f"{table} is missing: a speech folder needs it beside its sound files")
    with open(table, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield Source(
                id=f"{prefix}/{row['id']}",
                text=row["text"],
                speaker=f"{prefix}/{row['speaker']}",
                language=row["lang"],
                split="test" if row["split"] == "test" else "train",
                file=str(folder / row["file"]),
            )


def load(source: Source) -> tuple[np.ndarray, str] | None:
    """Samples of a source as int16 at 16 kHz, and its phones; None when a synthesiser refuses a line."""
    try:
        if source.line is not None:
            samples = speak(source.line)
        else:
            audio = read_audio(source.file)
            heard = Audio(audio.samples, round(audio.sample_rate * source.speed))
            samples = resample(heard, TOKENIZER_RATE).samples
    except RequestError:
        if source.line is None:
            raise
        return None
    if source.room is not None:
        samples = in_a_room(samples, source.room)
    peak = max(1e-4, float(np.abs(samples).max()))
    said = " ".join(phones(plain(source.text), source.language)) if source.text and available() else ""
    return np.round(samples * min(1.0, 0.99 / peak) * 32767).astype(np.int16), said


def write_corpus(folder: Path, sources: Iterable[Source], workers: int) -> Corpus:
    """Decodes or speaks every source with several processes and writes a corpus folder."""
    if not available():
        logger.warning("espeak-ng is not on the PATH: the clips have no phones, tokenizers will learn characters")
    make_folder(folder)
    sources = list(sources)
    clips: list[Clip] = []
    pieces: list[np.ndarray] = []
    start = 0
    with ProcessPoolExecutor(workers) as pool:
        for source, loaded in zip(sources, tqdm(pool.map(load, sources, chunksize=16), total=len(sources))):
            if loaded is None:
                continue
            samples, said = loaded
            clips.append(
                Clip(source.id, source.text, source.speaker, source.language, source.split, start, len(samples), said)
            )
            pieces.append(samples)
            start += len(samples)
    np.save(folder / "samples.npy", np.concatenate(pieces))
    text = "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")
    return Corpus.open(folder)
