"""Several result files of one machine as one file: `python -m stepaudio.bench.gather OUT.json FILE.json ...`

The gathered file is `{"runs": [{"command", "machine", "rows"}, ...]}`; rows that were left out of a run are dropped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizer.errors import RequestError, run
from tokenizer.files import atomic_write


def gather(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The runs of result files, oldest first as given. Raises RequestError for a file that is none."""
    runs = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in result["rows"] if "skipped" not in row]
            runs.append({"command": result["command"], "machine": result["machine"], "rows": rows})
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"{path} is no result file of stepaudio bench: {error}") from None
    return {"runs": runs}


def main() -> None:
    """Writes the first argument from the others."""
    if len(sys.argv) < 3:
        raise RequestError("give the file to write and the result files: gather OUT.json FILE.json ...")
    target, *sources = map(Path, sys.argv[1:])
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(gather(sources), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
