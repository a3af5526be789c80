"""Replays golden data through this code and compares: one row per tensor group, exit 1 on a difference.

Example: python scripts/check_golden.py --golden tests/golden --only flow,vocoder
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from stepaudio.golden.replay import COMPONENTS, present, replay
from tokenizer.errors import RequestError, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--golden", type=Path, required=True, help="folder with one sub-folder per component")
    parser.add_argument("--only", help=f"components to replay, by commas; known: {', '.join(COMPONENTS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of a table")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if not args.golden.is_dir():
        raise RequestError(f"{args.golden} is not a folder: give the one that holds the golden components")
    chosen = args.only.split(",") if args.only else present(args.golden)
    if absent := [name for name in COMPONENTS if name not in chosen]:
        print(f"not replayed: {', '.join(absent)}", file=sys.stderr)
    failed = 0
    for component in chosen:
        for row in replay(component, args.golden):
            failed += not row.ok
            if args.json:
                print(json.dumps({"component": component, **asdict(row), "ok": row.ok}, ensure_ascii=False))
            else:
                verdict = "ok  " if row.ok else "FAIL"
                figures = f"{row.difference:9.2e} <= {row.tolerance:7.1e}"
                print(f"{verdict} {component:<21} {row.group:<44} {figures}  {row.note}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
