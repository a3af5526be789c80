"""The tables of measurements in the READMEs, made from the result files in `benchmarks/`.

Run `python -m stepaudio.bench.table` after a measurement; a test checks that the table is current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.errors import run
from tokenizer.files import atomic_write

REPO = Path(__file__).resolve().parents[2]
READMES = (REPO / "README.md", REPO / "README_CN.md")
_PLACE = re.compile(r"(<!-- benchmarks -->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
_GPU_PLACE = re.compile(r"(<!-- gpu -->\n).*?(<!-- end of gpu -->)", re.DOTALL)
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
        timed = [row for row in result.get("rows", ()) if row.get("unit") == "s"]
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


_GPU_ROWS = (  # what the table calls it, its row, the row of its baseline in the same run
    ("3B LM, one token, context 1k", "lm bfloat16, batch 1, context 1024", "lm eager, batch 1, context 1024"),
    ("3B LM, one token, context 8k", "lm bfloat16, batch 1, context 8192", ""),
    ("3B LM int8, one token", "lm int8, batch 1, context 1024", "lm bfloat16, batch 1, context 1024"),
    ("3B LM fp8, one token", "lm fp8, batch 1, context 1024", "lm bfloat16, batch 1, context 1024"),
    ("3B LM int4, one token", "lm int4, batch 1, context 1024", "lm bfloat16, batch 1, context 1024"),
    ("3B LM, step of 32 rows, context 1k", "lm bfloat16, batch 32, context 1024", ""),
    ("3B LM, step of 64 rows, context 1k", "lm bfloat16, batch 64, context 1024", ""),
    ("3B LM, prefill of 1,000 tokens", "lm bfloat16, prefill 1000 tokens", ""),
    ("flow, 1 s of speech", "flow, 1 s, batch 1, auto", "flow, 1 s, batch 1, plain"),
    ("flow, 10 s of speech", "flow, 10 s, batch 1, auto", "flow, 10 s, batch 1, plain"),
    ("vocoder, 10 s", "vocoder, 10 s, batch 1, auto", "vocoder, 10 s, batch 1, plain"),
    ("vocoder in float16, 10 s", "vocoder, 10 s, batch 1, auto float16", "vocoder, 10 s, batch 1, plain"),
    ("dual tokenizer, 10 s", "dual tokenizer, 10 s, batch 1, auto", "dual tokenizer, 10 s, batch 1, plain"),
    ("dual tokenizer, 32 x 10 s", "dual tokenizer, 10 s, batch 32, auto", "dual tokenizer, 10 s, batch 32, plain"),
    ("130B, int4, 1 GPU, one token", "130b int4, 1 GPU, token at context 256", ""),
    ("130B, bfloat16, 2 GPUs, one token", "130b bfloat16, 2 GPUs, token at context 256", ""),
    ("130B, bfloat16, 2 GPUs, prefill of 1,000", "130b bfloat16, 2 GPUs, prefill of 1000 tokens", ""),
)


@dataclass(frozen=True)
class GpuRow:
    """One line of the table: milliseconds of the fast path, of its baseline, and the share of memory speed reached."""

    label: str
    now: float
    before: float | None
    share: float | None

    def __str__(self) -> str:
        before = ("", "") if self.before is None else (f"{self.before:.3g}", f"{self.before / self.now:.1f} x")
        share = "" if self.share is None else f"{self.share:.0%}"
        return f"| {self.label} | {before[0]} | {self.now:.3g} | {before[1]} | {share} |"


def gpu_rows(path: Path) -> Iterator[GpuRow]:
    """The rows of a gathered file that the table and the picture show."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    for label, name, baseline in _GPU_ROWS:
        for one in runs:
            medians = {row["name"]: row for row in one["rows"] if "median" in row}
            if name in medians:
                before = _milliseconds(medians[baseline]) if baseline in medians else None
                row = medians[name]
                yield GpuRow(label, _milliseconds(row), before, row.get("share_of_copy"))
                break


def gpu_table(path: Path = REPO / "benchmarks/h200.json") -> str:
    """Markdown: milliseconds on a GPU beside the plain path in the same run, and the share of memory bandwidth."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    lines = ["| what | baseline, ms | ms | faster | share of memory speed |", "|---|---|---|---|---|"]
    machine = runs[0]["machine"]
    commands = ", ".join(f"`{one['command']}`" for one in runs)
    last = f"{machine['gpu']}, torch {machine['torch']}, commit {machine['commit']}: {commands}"
    return "\n".join([*lines, *map(str, gpu_rows(path)), "", last, ""])


def _milliseconds(row: dict[str, Any]) -> float:
    return row["median"] * {"s": 1000.0, "ms": 1.0, "us": 0.001}[row["unit"]]


def main() -> None:
    """Writes the tables into both READMEs."""
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        for place, made in ((_PLACE, table()), (_GPU_PLACE, gpu_table())):
            assert place.search(text), f"{path} has no place for the table"
            text = place.sub(lambda m, made=made: m[1] + made + m[2], text)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
