"""Replays the chat conversations of `prompts`: token ids of message lists.

The release's own rules are replayed where this code departs from them on purpose: special pieces typed in a text
become ids, and messages of an unknown content type are dropped (here they are refused, and lists of parts are
taken). The codes of a sound are those of the recorded text, `dual_tokens` replays how they are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stepaudio.chat.messages import from_dicts
from stepaudio.chat.template import build_prompt
from stepaudio.golden.base import Row, exact, read_json
from stepaudio.lm.vocab import Vocab
from tokenizer.errors import RequestError

_CODES = re.compile(r"(?:<audio_\d+>)+")
_KNOWN = ("text", "audio")


def replay(root: Path) -> Iterator[Row]:
    """Ids of every recorded conversation, and whether what the release refuses or drops is refused."""
    folder = root / "prompts"
    vocab = Vocab.from_file(folder / "tokenizer.model")
    cases = read_json(folder / "golden.json")["chat"]
    for i, case in enumerate(cases):
        if "ids" in case:
            messages = from_dicts(_with_codes([row for row in case["messages"] if not _is_odd(row)], case["text"]))
            yield exact(f"chat_prompts/{i}", build_prompt(vocab, messages, allow_special=True), case["ids"])
    odd = [row for case in cases for row in case["messages"] if _is_odd(row)]
    yield exact("chat_prompts/refused", [_refused(row) for row in odd], [True] * len(odd))


def _with_codes(rows: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with the codes of their recorded text in place of sound files."""
    codes = iter(_CODES.findall(text))
    return [
        {**row, "content": {"type": "audio", "audio": next(codes)}} if _kind(row) == "audio" else row for row in rows
    ]


def _is_odd(row: dict[str, Any]) -> bool:
    """Whether neither the release nor this code has a reading for the content."""
    content = row["content"]
    return not isinstance(content, str | list | None) and _kind(row) not in _KNOWN


def _kind(row: dict[str, Any]) -> Any:
    return row["content"].get("type") if isinstance(row["content"], dict) else None


def _refused(row: dict[str, Any]) -> bool:
    try:
        from_dicts([row])
    except RequestError:
        return True
    return False
