"""Sounds of an evaluation on disk, by what they are of: made once, judged as often as wanted, on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer.audio import Audio, read_audio, write_audio
from tokenizer.files import atomic_write, make_folder


@dataclass(frozen=True, eq=False)
class Take:
    """A sound and what is known about how it was made."""

    audio: Audio
    notes: dict[str, Any] = field(default_factory=dict)


class Store:
    """A folder of FLAC files, 16 bit, each with a JSON file of its notes."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)

    def fill(
        self, kind: str, keys: Sequence[str], make: Callable[[list[int]], Sequence[Take | None]]
    ) -> list[Take | None]:
        """The sound of every key: those that are missing are made, by their places. What cannot be made is None."""
        folder = make_folder(self.folder / kind)
        paths = [folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.flac" for key in keys]
        missing = [i for i, path in enumerate(paths) if not path.with_suffix(".json").exists()]
        for i, take in zip(missing, make(missing) if missing else ()):
            if take is not None:
                write_audio(paths[i], take.audio)
                with atomic_write(paths[i].with_suffix(".json")) as temporary:
                    temporary.write_text(json.dumps({"key": keys[i], **take.notes}, ensure_ascii=False), "utf-8")
        return [_read(path) for path in paths]


def _read(path: Path) -> Take | None:
    notes = path.with_suffix(".json")
    if not notes.exists():
        return None
    return Take(read_audio(path), json.loads(notes.read_text(encoding="utf-8")))
