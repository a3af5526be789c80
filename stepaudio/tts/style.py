"""Style tags: the bracketed words before a text that say how to speak it, as in `（四川话）（快速1）你好`.

Knows the table of tags (configs/styles.yaml) and how they are written. Knows nothing of models:
what a music tag leads to is decided by the prompt and the engine.
Source: formats.md section 4.5 and section 10, Q22 and Q23.
"""

from __future__ import annotations

import difflib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import yaml

from tokenizer.errors import RequestError
from tokenizer.files import config_file

RAP, HUMMING = "RAP", "哼唱"  # the tags that lead to the music flow
_OPEN, _CLOSE = "（(", "）)"
_MAX_TAG = 20  # characters; a longer bracket group is text


@dataclass(frozen=True)
class Tag:
    """One row of the table: the canonical form, its kind, its meaning and other spellings."""

    name: str
    kind: str  # emotion | language | music | speed
    gloss: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class StyledText:
    """A text without its leading tags.

    `prefix` holds the tags as the model is to read them, brackets and space behind as they were typed.
    """

    tags: tuple[str, ...]
    prefix: str
    text: str

    @property
    def music(self) -> str | None:
        """`RAP` or `哼唱` if one of the tags asks for it."""
        return next((tag for tag in self.tags if tag in (RAP, HUMMING)), None)


@lru_cache(maxsize=1)
def table() -> tuple[Tag, ...]:
    """The tags of configs/styles.yaml, in order."""
    rows = yaml.safe_load(config_file("styles.yaml").read_text(encoding="utf-8"))["tags"]
    return tuple(Tag(row["tag"], row["kind"], row["gloss"], tuple(row["aliases"])) for row in rows)


def parse(text: str, allow_any: bool = False) -> StyledText:
    """Takes the leading tags off a text; several may follow each other, in either bracket width.

    An alias becomes its canonical tag; a canonical tag stays as it was typed. A bracket group that
    is empty, unclosed or longer than 20 characters is text, and so is one in the middle of the text.
    Raises RequestError for an unknown tag (unless `allow_any`, which passes it on unchanged) and
    for a text of nothing but tags.
    """
    tags: list[str] = []
    prefix, rest = "", text.lstrip()
    while group := _leading_group(rest):
        name = _canonical(group[1:-1], allow_any)
        tags.append(name)
        behind = rest[len(group) :]
        rest = behind.lstrip()
        prefix += group[0] + name + group[-1] + behind[: len(behind) - len(rest)]
    if tags and not rest:
        raise RequestError(f"the text holds only style tags {prefix.strip()}: add the words to speak after them")
    return StyledText(tuple(tags), prefix, rest if tags else text)


def render_table() -> str:
    """The table for people: tag, kind, meaning, other spellings."""
    rows = [("tag", "kind", "meaning", "also written")]
    rows += [(tag.name, tag.kind, tag.gloss, ", ".join(tag.aliases)) for tag in table()]
    widths = [max(_columns(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths)) + "  " + row[3]
        for row in rows
    )


def _leading_group(text: str) -> str:
    """The bracket group a text begins with, nested brackets included; empty if that is no tag."""
    if not text.startswith(tuple(_OPEN)):
        return ""
    depth = 0
    for i, char in enumerate(text[: _MAX_TAG + 2]):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            group = text[: i + 1]
            return group if _key(group) else ""
    return ""


def _canonical(name: str, allow_any: bool) -> str:
    known = _spellings().get(_key(name))
    if known is not None:
        return known
    if allow_any:
        return name
    near = difflib.get_close_matches(_key(name), list(_spellings()), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]} ({_spellings()[near[0]]})? " if near else ""
    raise RequestError(
        f"unknown style tag {name!r}: {hint}`stepaudio tags` lists them, --allow-any-tag passes any on to the model"
    )


@lru_cache(maxsize=1)
def _spellings() -> dict[str, str]:
    """Every spelling, normalised, and the canonical tag it stands for."""
    return {_key(spelling): tag.name for tag in table() for spelling in (tag.name, *tag.aliases)}


def _key(name: str) -> str:
    """Spelling without case, width, spaces and outer brackets."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split()).strip("()")


def _columns(text: str) -> int:
    """Width on a terminal, where East Asian characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
