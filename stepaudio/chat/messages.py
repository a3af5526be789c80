"""A conversation as data: messages of text, sound and tool calls.

Knows nothing of ids, models or templates, and opens no file. `from_dicts` reads the release's form of it.
Source: formats.md section 4.4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

SYSTEM, HUMAN, ASSISTANT, TOOL = ROLES = ("system", "human", "assistant", "tool")
USER = "user"  # another word for human
_TYPES = ("text", "audio", "call")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class TextPart:
    """Words. Whatever they spell, the model reads them as text: never a control or audio id."""

    text: str

    def __post_init__(self) -> None:
        """Raises RequestError for what is no string, half a surrogate pair and control characters."""
        if not isinstance(self.text, str):
            raise RequestError(f"the text of a message must be a string, not {type(self.text).__name__}")
        if bad := _UNPRINTABLE.search(self.text):
            code = ord(bad.group())
            what = "half a surrogate pair" if code >= 0xD800 else "a control character"
            raise RequestError(f"the text holds {what} (U+{code:04X}) at position {bad.start()}: remove it")


@dataclass(frozen=True, eq=False)
class AudioPart:
    """Sound: a file, samples, or the codes it was turned into already; its words, where they are known."""

    audio: Path | Audio | AudioCodes
    transcript: str | None = None

    def __post_init__(self) -> None:
        """Takes any path. Raises RequestError for what is neither that nor sound."""
        if isinstance(self.audio, str | os.PathLike):
            object.__setattr__(self, "audio", Path(self.audio))
        elif not isinstance(self.audio, Audio | AudioCodes):
            raise RequestError(f"audio must be a path, an Audio or AudioCodes, not {_short(self.audio)}")


@dataclass(frozen=True)
class CallPart:
    """A tool call of the assistant, as it wrote it between the call delimiters."""

    body: str


Part = TextPart | AudioPart | CallPart


@dataclass(frozen=True)
class Message:
    """One turn. `open` leaves it without an end, so that the model goes on with it."""

    role: str
    parts: tuple[Part, ...] = ()
    open: bool = False

    def __post_init__(self) -> None:
        """Takes `user` for `human`. Raises RequestError for any other role than the four."""
        role = HUMAN if self.role == USER else self.role
        if role not in ROLES:
            raise RequestError(f"unknown role {self.role!r}: use {', '.join(ROLES)} (or {USER} for {HUMAN})")
        object.__setattr__(self, "role", role)

    @classmethod
    def of(cls, role: str, *contents: str | Path | Audio | AudioCodes | Part) -> Message:
        """A message of strings (text), sounds and parts."""
        return cls(role, tuple(_part_of(content) for content in contents))

    @property
    def text(self) -> str:
        """Its words, those of calls and sounds left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it but blanks."""
        return all(isinstance(part, TextPart) and not part.text.strip() for part in self.parts)

    def with_parts(self, parts: Sequence[Part]) -> Message:
        return replace(self, parts=tuple(parts))


def from_dicts(rows: Any, folder: Path = Path()) -> list[Message]:
    """A conversation from the release's form, `[{"role": ..., "content": ...}, ...]`.

    The content is a string, `{"type": "text", "text"}`, `{"type": "audio", "audio"}`, `{"type": "call", "call"}` with
    the call as the model wrote it, a list of these, or None for a turn without content or end. An audio is a path
    (relative to `folder`), a string `<audio_1><audio_2>...`, an `Audio`, `AudioCodes`, or an array with a
    `sample_rate` beside it; `transcript` may hold its words. Messages pass through as they are.
    Raises RequestError that names the message, the value and what is allowed.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise RequestError(f'a conversation must be a list of {{"role", "content"}} objects, not {_short(rows)}')
    messages = []
    for i, row in enumerate(rows):
        try:
            messages.append(row if isinstance(row, Message) else _message(row, folder))
        except RequestError as error:
            raise RequestError(f"message {i + 1}: {error}") from None
    return messages


def printable(text: str) -> str:
    """The text without control characters (line ends and tabs stay) and without halves of surrogate pairs."""
    return _UNPRINTABLE.sub("", text)


def _message(row: Any, folder: Path) -> Message:
    if not isinstance(row, Mapping) or "role" not in row or "content" not in row:
        raise RequestError(f'must be an object with "role" and "content", not {_short(row)}')
    content = row["content"]
    if content is None:
        return Message(row["role"], open=True)
    contents = content if isinstance(content, list | tuple) else [content]
    return Message(row["role"], tuple(_part(item, folder) for item in contents))


def _part(content: Any, folder: Path) -> Part:
    if isinstance(content, str):
        return TextPart(content)
    if not isinstance(content, Mapping):
        raise RequestError(f'content must be a string, an object {{"type", ...}} or a list, not {_short(content)}')
    kind = content.get("type")
    if kind not in _TYPES:
        raise RequestError(f"unknown content type {kind!r}: use {', '.join(_TYPES)}")
    if kind not in content:
        raise RequestError(f"content of type {kind!r} lacks the field {kind!r}")
    if kind == "text":
        return TextPart(content["text"])
    if kind == "call":
        return CallPart(TextPart(content["call"]).text)
    transcript = content.get("transcript")
    if transcript is not None:
        transcript = TextPart(transcript).text
    return AudioPart(_audio(content["audio"], content.get("sample_rate"), folder), transcript)


def _audio(value: Any, sample_rate: Any, folder: Path) -> Path | Audio | AudioCodes:
    if isinstance(value, Audio | AudioCodes):
        return value
    if isinstance(value, str) and value.startswith("<audio_"):
        return AudioCodes.from_text(value)
    if isinstance(value, str | os.PathLike) and str(value):
        path = folder / value
        if not path.is_file():
            raise RequestError(f"the sound file {path} does not exist")
        return path
    if isinstance(sample_rate, int | float) and hasattr(value, "__array__"):
        return Audio(np.asarray(value), sample_rate)
    raise RequestError(
        f"audio must be a path, an Audio, AudioCodes, or an array with a sample_rate beside it, not {_short(value)}"
    )


def _part_of(content: str | Path | Audio | AudioCodes | Part) -> Part:
    if isinstance(content, str):
        return TextPart(content)
    return content if isinstance(content, Part) else AudioPart(content)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
