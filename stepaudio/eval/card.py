"""The table of figures in a checkpoint's model card, made from its result file, so that the two cannot disagree.

Run `python -m stepaudio.eval.card` after an evaluation; a test checks that the table is current. The card holds two
lines, `<!-- figures -->` and `<!-- end of figures -->`, with the table between them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from stepaudio.checkpoints import BUNDLED
from stepaudio.eval.rows import table
from tokenizer.errors import RequestError, run
from tokenizer.files import atomic_write

RESULTS = BUNDLED.parents[1] / "benchmarks" / "nano.json"
CARD = BUNDLED / "README.md"
_PLACE = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def figures(results: dict[str, Any]) -> str:
    """Markdown: every row, then the runs they come from. Raises RequestError for a file of another form."""
    if "runs" not in results:
        raise RequestError("the result file names no runs: write it with scripts/evaluate.py")
    return table(results["rows"]) + "\n" + "".join(f"- {_describe(run)}\n" for run in results["runs"])


def _describe(run: dict[str, Any]) -> str:
    machine = run["machine"]
    where = machine["gpu"] or machine["cpu"]
    return (
        f"`{run['command']}`, checkpoint {run['checkpoint']}, commit {machine['commit']}, seed {run['seed']}, "
        f"{machine['cores']} cores, {where}, torch {machine['torch']}, pocketsphinx {machine['pocketsphinx']}"
    )


def has_place(card: str) -> bool:
    """Whether a card has the two lines."""
    return _PLACE.search(card) is not None


def filled(card: str, results: dict[str, Any]) -> str:
    """The card with its table made anew. Raises RequestError without a place for it."""
    if not has_place(card):
        raise RequestError("the card has no place for the table: add the lines <!-- figures --> and the end of it")
    return _PLACE.sub(lambda found: found[1] + figures(results) + found[2], card)


def main() -> None:
    """Writes the table into a card."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="what scripts/evaluate.py wrote")
    parser.add_argument("--card", type=Path, default=CARD, help="the README.md to fill")
    args = parser.parse_args()
    for path in (args.results, args.card):
        if not path.is_file():
            raise RequestError(f"{path} does not exist")
    text = filled(args.card.read_text(encoding="utf-8"), json.loads(args.results.read_text(encoding="utf-8")))
    with atomic_write(args.card) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
