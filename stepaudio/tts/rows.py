"""JSONL in, results.jsonl out: the rows of a run that may be killed at any moment and is resumed by the same command.

An item's sound is renamed into place first, its row is appended after it. So a crash between the two repeats that one
item, and a row is never without its sound. Items that failed are tried again by the next run.
Knows rows and files, not what the items are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO, TypeVar

from tokenizer.errors import RequestError
from tokenizer.files import atomic_write

RESULTS = "results.jsonl"
_LOCK = ".results.lock"
_MAX_ID_BYTES = 200
_LEFT_OVER = re.compile(r"\..+-[a-z0-9_]{8}\.wav")  # of a write that was killed


class Item(Protocol):
    """What is to be done."""

    @property
    def id(self) -> str: ...

    @property
    def digest(self) -> str:
        """Changes whenever the request does, so that a changed item is done anew."""
        ...


class Row(Protocol):
    """What came of an item: a dataclass with these fields, all of them JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def id(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def path(self) -> str | None:
        """The sound, in the folder of the results; None if there is none."""
        ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=Row)


def read_rows(path: str | os.PathLike[str], fields: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where it stands, id and content of each row of a JSONL file; empty lines are left out.

    Raises RequestError that names the line: broken JSON, a field that is not among `fields`, an id that is no file
    name or comes twice; and for a file without rows.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    seen: set[str] = set()
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = _parse(line, where, fields)
            name = _check_id(row.get("id"), where)
            if name in seen:
                raise RequestError(f"{where}: the id {name!r} comes twice")
            seen.add(name)
            yield where, name, row
    if not seen:
        raise RequestError(f"{path} holds no jobs")


def beside(path: Any, folder: Path) -> Any:
    """A path that a row names: as it is if there is something from the current folder, else in `folder`."""
    if isinstance(path, str) and not Path(path).exists() and (folder / path).exists():
        return str(folder / path)
    return path


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Held while this process writes to the folder; a killed process lets go of it. Raises RequestError if taken."""
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"another run is writing to {folder}: wait for it or choose another folder") from None
        yield


def resume(folder: Path, items: Sequence[Item], parse: Callable[[str], R | None]) -> dict[str, R]:
    """The results of `items` that stand; all that does not is cleared out of the log, left-over temporary files too.

    A row stands if it is whole (`parse` gives it), without error, its item unchanged and its sound there.
    Rows of other items stay.
    """
    for path in folder.glob(".*.wav"):
        if _LEFT_OVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    log = folder / RESULTS
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    digests = {item.id: item.digest for item in items}
    done: dict[str, R] = {}
    for row in filter(None, map(parse, text.split("\n"))):
        changed = digests.get(row.id, row.digest) != row.digest
        if not (row.error or changed) and (row.path is None or (folder / row.path).is_file()):
            done[row.id] = row
    kept = "".join(_line(row) for row in done.values())
    if kept != text:
        with atomic_write(log) as temporary:
            temporary.write_text(kept, encoding="utf-8")
    return {name: row for name, row in done.items() if name in digests}


def append(log: TextIO, row: Row) -> None:
    """Adds a row to the log, on disk when this returns."""
    log.write(_line(row))
    log.flush()
    os.fsync(log.fileno())


def _parse(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise RequestError(f"{where}: a row must be an object with {fields[0]} and {fields[1]}")
    unknown = [name for name in row if name not in fields]
    if unknown:
        raise RequestError(f"{where}: unknown field {unknown[0]!r}: the fields are {', '.join(fields)}")
    return row


def _check_id(name: Any, where: str) -> str:
    """An id is a plain file name."""
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{where}: 'id' is missing or empty")
    odd = any(char in '/\\:*?"<>|' or not char.isprintable() for char in name)
    if odd or name.startswith(".") or len(name.encode("utf-8", "replace")) > _MAX_ID_BYTES:
        raise RequestError(
            f"{where}: the id {name[:60]!r} is no file name: no slashes, no leading dot, at most {_MAX_ID_BYTES} bytes"
        )
    return name


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"
