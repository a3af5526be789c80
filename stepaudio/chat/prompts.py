"""The texts of configs/prompts.yaml: what the model is told to do, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import yaml

from stepaudio.chat.messages import Message, TextPart
from tokenizer.errors import RequestError
from tokenizer.files import config_file


@dataclass(frozen=True)
class Prompt:
    """One instruction. `{name}` in its text stands for each of its `fields`."""

    name: str
    role: str  # the turn it belongs in
    language: str  # zh | en
    text: str
    gloss: str  # its meaning in English, and where it comes from
    fields: tuple[str, ...] = ()

    def message(self, **values: str) -> Message:
        """The turn with its fields filled in. Raises RequestError for one that is missing or unknown."""
        if set(values) != set(self.fields):
            raise RequestError(
                f"prompt {self.name!r} takes the fields {', '.join(self.fields) or 'none'}, "
                f"found {', '.join(values) or 'none'}"
            )
        text = self.text
        for name, value in values.items():
            text = text.replace("{" + name + "}", value)
        return Message(self.role, (TextPart(text),))


@lru_cache(maxsize=1)
def prompts() -> Mapping[str, Prompt]:
    """All of them by name."""
    rows = yaml.safe_load(config_file("prompts.yaml").read_text(encoding="utf-8"))["prompts"]
    return MappingProxyType(
        {name: Prompt(name, **{**row, "fields": tuple(row.get("fields", ()))}) for name, row in rows.items()}
    )


def prompt(name: str, **values: str) -> Message:
    """The turn of one prompt. Raises RequestError for an unknown name (lists the known) or wrong fields."""
    if name not in prompts():
        raise RequestError(f"unknown prompt {name!r}: known: {', '.join(prompts())}")
    return prompts()[name].message(**values)
