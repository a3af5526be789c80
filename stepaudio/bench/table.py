"""The table of measurements in the READMEs, made from the result files in `benchmarks/`.

Run `python -m stepaudio.bench.table` after a measurement; a test checks that the table is current.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizer.errors import run
from tokenizer.files import atomic_write

REPO = Path(__file__).resolve().parents[2]
READMES = (REPO / "README.md", REPO / "README_CN.md")
_PLACE = re.compile(r"(<!-- benchmarks -->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
_SHOWN = {  # further figures of a row that the table shows, with their labels
    "ratio_to_onnxruntime": "{} x onnxruntime's median",
    "ratio_of_fastest": "{} x its fastest",
    "peak_above_first_mb": "memory {:+} MB over the first row",
    "note": "{}",
}


def table(folder: Path = REPO / "benchmarks") -> str:
    """Markdown: one row per measurement with its machine, and the commands under it."""
    lines = ["| what | sound | seconds | remarks | machine |", "|---|---|---|---|---|"]
    commands = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        timed = [row for row in result["rows"] if row.get("unit") == "s"]
        if not timed:
            continue
        machine = result["machine"]
        where = machine["gpu"] or f"{machine['threads']} threads of {machine['cpu']}"
        lines += [_line(row, where) for row in timed]
        commands.append(f"`{path.name}`: `{result['command']}`, commit {machine['commit']}, torch {machine['torch']}")
    return "\n".join([*lines, "", *(f"- {command}" for command in commands), ""])


def _line(row: dict[str, Any], where: str) -> str:
    remarks = [label.format(row[key]) for key, label in _SHOWN.items() if row.get(key)]
    return f"| {row['name']} | {row['audio_s']:g} s | {row['median']:.3g} | {', '.join(remarks)} | {where} |"


def main() -> None:
    """Writes the table into both READMEs."""
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        assert _PLACE.search(text), f"{path} has no place for the table"
        with atomic_write(path) as temporary:
            temporary.write_text(_PLACE.sub(lambda m: m[1] + table() + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    run(main)
