"""A tagged yaml file read as data: no class is imported, nothing is called, no random generator is seeded.

Knows the four tags that `cosyvoice.yaml` uses (`!new:`, `!name:`, `!apply:`, `!ref <key>`) and turns them into
plain values; knows nothing of models. Every other tag is refused by name, as is arithmetic in `!ref`.
HyperPyYAML, which wrote the format, runs the tags while it loads; PyYAML's safe loader with constructors of
our own does not. Source: formats.md sections 7.1, 10 (Q32) and 13.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from tokenizer.errors import CheckpointError
from tokenizer.files import require_file

_REF = re.compile(r"<([^<>\[\]]+)((?:\[[^\[\]]+\])*)>")
_MAX_REFS = 32  # references to references, before it is called a circle

_SHORT = reprlib.Repr()  # bounded, whatever aliases the file piles up
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80

T = TypeVar("T")


@dataclass(frozen=True)
class Tagged:
    """`!new:`, `!name:` or `!apply:` with the dotted name it would have imported and its arguments."""

    tag: str
    name: str
    value: Any

    def __repr__(self) -> str:
        return f"{self.tag}{self.name}"


@dataclass(frozen=True)
class Ref:
    """`!ref <a[b]>`, not yet looked up."""

    text: str

    def __repr__(self) -> str:
        return f"!ref {self.text}"


class _Loader(yaml.SafeLoader):
    """SafeLoader plus the tags of the format."""


def _tagged(tag: str) -> Any:
    def construct(loader: _Loader, name: str, node: yaml.Node) -> Tagged:
        return Tagged(tag, name, _plain(loader, node))

    return construct


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


def _ref(loader: _Loader, node: yaml.Node) -> Ref:
    return Ref(str(_plain(loader, node)))


for _tag in ("!new:", "!name:", "!apply:"):
    _Loader.add_multi_constructor(_tag, _tagged(_tag))
_Loader.add_constructor("!ref", _ref)
# PyYAML keeps to YAML 1.1, where 1e-06 is a text: a number here, as in YAML 1.2
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Section:
    """One mapping of the file, read key by key; `finish` refuses the keys that nobody read.

    Errors are CheckpointErrors that name the file, the key, the value and what is supported.
    """

    def __init__(self, file: Path, path: str, values: Mapping[str, Any], root: Mapping[str, Any]) -> None:
        self.path = path
        self._file, self._values, self._root = file, values, root
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def refuse(self, key: str, value: Any, supported: str) -> NoReturn:
        raise CheckpointError(f"{self._file}: {self._at(key)} is {_SHORT.repr(value)}; supported: {supported}")

    def section(self, key: str, expected_name: str | None = None) -> Section:
        """The mapping under `key`, empty if absent; its class, if the file names one, must be `expected_name`.

        A key that is missing at the top of the file is refused.
        """
        if key not in self._values:
            if not self.path:
                raise CheckpointError(f"{self._file}: the key {key!r} is missing: is this the release's file, whole?")
            return Section(self._file, self._at(key), {}, self._root)
        value = self._get(key)
        if isinstance(value, Tagged):
            name = value.name.rpartition(".")[2]
            if value.tag == "!apply:" or (expected_name is not None and name != expected_name):
                self.refuse(key, value, f"!new:{expected_name} or a plain mapping (nothing is executed)")
            value = value.value or {}
        if not isinstance(value, dict):
            self.refuse(key, value, "a mapping")
        return Section(self._file, self._at(key), value, self._root)

    def is_null(self, key: str) -> bool:
        return key in self._values and self._get(key) is None

    def value(self, key: str, like: Any) -> Any:
        """The value under `key` in the type of `like`, which is also the fallback for an absent key.

        Counts (int) are at least 1, numbers (float) finite and not negative, tuples hold counts.
        """
        if key not in self._values:
            return like
        return self._convert(key, self._get(key), like)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses a value of `key` outside `allowed`; an absent key is fine."""
        if key in self._values:
            value = self._get(key)
            if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
                self.refuse(key, value, " or ".join(repr(choice) for choice in allowed))

    def fill(self, kind: type[T], **given: Any) -> T:
        """A dataclass whose fields are read by their own names; `given` fields are taken as they are."""
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name not in given and field.default is not MISSING:
                given[field.name] = self.value(field.name, field.default)
        return kind(**given)

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Refuses the first key that was neither read nor is known to be of no concern here."""
        unknown = sorted(str(key) for key in self._values.keys() - self._seen - set(ignored))
        if unknown:
            raise CheckpointError(
                f"{self._file}: unknown key {self._at(unknown[0])!r} = {_SHORT.repr(self._values.get(unknown[0]))}; "
                f"supported in {self.path or 'the file'}: {', '.join(sorted(self._seen | set(ignored)))}"
            )

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _get(self, key: str) -> Any:
        self._seen.add(key)
        return self._resolve(key, self._values[key])

    def _resolve(self, key: str, value: Any) -> Any:
        for _ in range(_MAX_REFS):
            if not isinstance(value, Ref):
                return value
            match = _REF.fullmatch(value.text.strip())
            if match is None:
                self.refuse(key, value, "!ref <key> or !ref <key[key]>, without arithmetic")
            found: Any = self._root
            for part in (match[1], *re.findall(r"\[([^\[\]]+)\]", match[2])):
                found = found.value if isinstance(found, Tagged) else found
                if not isinstance(found, dict) or part not in found:
                    self.refuse(key, value, "a reference to a key of this file")
                found = found[part]
            value = found
        self.refuse(key, value, "references that do not lead in a circle")

    def _convert(self, key: str, value: Any, like: Any) -> Any:
        if isinstance(like, tuple):
            if isinstance(value, list) and value:
                return tuple(self._convert(key, self._resolve(key, item), like[0]) for item in value)
            self.refuse(key, value, f"a list like {list(like)}")
        if isinstance(like, int) and type(value) is int and value >= 1:
            return value
        if isinstance(like, float) and type(value) in (int, float) and math.isfinite(value) and value >= 0:
            return float(value)
        self.refuse(key, value, f"a {'whole number, 1 or more' if isinstance(like, int) else 'number, 0 or more'}")


def read_yaml(file: Path) -> Section:
    """The file's top mapping. Raises CheckpointError if it is missing, no yaml, or holds an unknown tag."""
    require_file(file, "configuration")
    try:
        values = yaml.load(file.read_bytes(), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{file}: {line}{problem}; tags read: !new: !name: !apply: !ref") from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as yaml ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds no mapping, found {type(values).__name__}")
    return Section(file, "", values, values)
