"""Figures as rows of a JSON file: value, bound, how many items they rest on, and the run they come from.

A row is judged when it is made (`met`), because its bound may come from a baseline of the same run. The file keeps
the rows of parts that are done for the same checkpoint, so that an evaluation goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizer.files import atomic_write

Row = dict[str, Any]


def figure(
    name: str, value: float, n: int, *, at_most: float | None = None, at_least: float | None = None, **more: Any
) -> Row:
    """A row of one number that rests on `n` items; with a bound it says whether that is met."""
    row: Row = {"name": name, "value": round(float(value), 4), "n": n, **more}
    for key, bound in (("at_most", at_most), ("at_least", at_least)):
        if bound is not None:
            row |= {key: round(bound, 4), "met": bool(value <= bound if key == "at_most" else value >= bound)}
    return row


def skipped(name: str, reason: str) -> Row:
    """A row that says why a figure is not there."""
    return {"name": name, "value": None, "n": 0, "skipped": reason}


@dataclass(frozen=True)
class Run:
    """Where rows come from."""

    command: str
    checkpoint: str  # hash of its files
    seed: int
    limit: int | None
    machine: Row


@dataclass
class Results:
    """A result file: `rows` name their run by its place in `runs`."""

    path: Path
    run: Run
    rows: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, run: Run) -> Results:
        """Goes on with a file: rows of another checkpoint, and files of another form, are left behind."""
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        results = cls(path, run)
        for row in old.get("rows", ()) if "runs" in old else ():
            source = old["runs"][row["run"]]
            if source["checkpoint"] == run.checkpoint:
                results._take(row, source)
        return results

    def _take(self, row: Row, source: Row) -> None:
        if source not in self.runs:
            self.runs.append(source)
        self.rows.append({**row, "run": self.runs.index(source)})

    def done(self, part: str) -> bool:
        """Whether the part is there in full, asked with the same seed and limit."""
        rows = [row for row in self.rows if row["part"] == part]
        same = all(self._asked(row) == (self.run.seed, self.run.limit) for row in rows)
        return bool(rows) and same and not any("skipped" in row for row in rows)

    def _asked(self, row: Row) -> tuple[int, int | None]:
        source = self.runs[row["run"]]
        return source["seed"], source["limit"]

    def replace(self, part: str, rows: list[Row], seconds: float) -> None:
        """Puts the rows of a part in place of older ones and writes the file."""
        kept = [(row, self.runs[row["run"]]) for row in self.rows if row["part"] != part]
        self.rows, self.runs = [], []
        for row, source in kept:
            self._take(row, source)
        for row in rows:
            self._take({"part": part, **row, "part_seconds": round(seconds, 1)}, asdict(self.run))
        with atomic_write(self.path) as temporary:
            content = {"runs": self.runs, "rows": self.rows}
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def checkpoint_hash(root: Path) -> str:
    """12 hex digits that change with any file of a checkpoint but its README."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "README.md"):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def table(rows: list[Row]) -> str:
    """Markdown: figure, value, target, whether it is met, number of items."""
    lines = ["| figure | measured | target | met | n |", "|---|---|---|---|---|"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | skipped: {row['skipped']} | | | |")
            continue
        met = {True: "yes", False: "**no**", None: ""}[row.get("met")]
        lines.append(f"| {row['name']} | {row['value']:.3f} | {bound(row)} | {met} | {row['n']} |")
    return "\n".join(lines) + "\n"


def bound(row: Row) -> str:
    """The target of a row in signs; empty without one."""
    for key, sign in (("at_most", "≤"), ("at_least", "≥")):
        if key in row:
            return f"{sign} {row[key]:.3f}"
    return ""
