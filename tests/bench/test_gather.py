"""Result files of one machine become one file, a table and a picture."""

import json

import pytest

from stepaudio.bench.gather import gather
from stepaudio.bench.table import gpu_rows, gpu_table
from tokenizer.errors import RequestError

MACHINE = {"gpu": "a GPU", "torch": "2", "commit": "abc"}


def result(path, *rows):
    path.write_text(json.dumps({"command": "stepaudio bench lm", "machine": MACHINE, "rows": rows}))
    return path


def test_rows_stand_beside_the_baseline_of_their_own_run(tmp_path):
    eager = {"name": "lm eager, batch 1, context 1024", "unit": "ms", "median": 30.0}
    fast = {"name": "lm bfloat16, batch 1, context 1024", "unit": "ms", "median": 2.0, "share_of_copy": 0.8}
    flow = {"name": "flow, 1 s, batch 1, auto", "unit": "s", "median": 0.02}
    late = {"name": "flow, 1 s, batch 1, plain", "skipped": "began after 1 s"}
    files = [result(tmp_path / "a.json", eager, fast), result(tmp_path / "b.json", flow, late)]
    (tmp_path / "all.json").write_text(json.dumps(gather(files)))
    rows = list(gpu_rows(tmp_path / "all.json"))
    assert [(row.now, row.before) for row in rows] == [(2.0, 30.0), (20.0, None)]
    assert "| 30 | 2 | 15.0 x | 80% |" in gpu_table(tmp_path / "all.json")


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RequestError, match=r"x\.json is no result file"):
        gather([tmp_path / "x.json"])
