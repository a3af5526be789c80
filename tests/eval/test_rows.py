"""Rows, the result file that goes on where it stopped, and the card made from it."""

import json

import pytest

from stepaudio.eval.card import CARD, RESULTS, figures, filled, has_place
from stepaudio.eval.rows import Results, Run, checkpoint_hash, figure, skipped, table
from tokenizer.errors import RequestError

MACHINE = {"cpu": "c", "gpu": None, "cores": 2, "commit": "abc", "torch": "2", "pocketsphinx": None}


def opened(path, **changes):
    return Results.open(
        path, Run(**{"command": "x", "checkpoint": "aa", "seed": 1, "limit": 3, "machine": MACHINE} | changes)
    )


def test_bounds_are_judged_when_the_row_is_made():
    assert figure("a", 0.07, 5, at_most=0.07)["met"] and not figure("a", 0.071, 5, at_most=0.07)["met"]
    assert figure("a", 0.9, 5, at_least=0.9)["met"] and "met" not in figure("a", 0.9, 5)
    shown = table([figure("a", 0.2, 5, at_most=0.07), figure("b", 1, 2, at_least=0.9), skipped("c", "no judge")])
    assert "| a | 0.200 | ≤ 0.070 | **no** | 5 |" in shown and "| b | 1.000 | ≥ 0.900 | yes | 2 |" in shown
    assert "skipped: no judge" in shown


def test_a_file_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "r.json"
    first = opened(path)
    first.replace("asr", [figure("a", 0.1, 3)], 1.0)
    first.replace("speech", [skipped("b", "no judge")], 1.0)
    again = opened(path)
    assert again.done("asr") and not again.done("speech") and not again.done("chat")
    again.replace("speech", [figure("b", 0.3, 3)], 2.0)
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["a", "b"]
    assert not opened(path, limit=None).done("asr") and not opened(path, seed=2).done("asr")
    assert opened(path, limit=None).rows
    other = opened(path, checkpoint="bb")
    assert not other.rows
    path.write_text('{"command": "old", "machine": {}, "rows": [{"task": "asr"}]}')
    assert not opened(path).rows


def test_rows_of_two_runs_name_their_own(tmp_path):
    path = tmp_path / "r.json"
    opened(path).replace("asr", [figure("a", 0.1, 3)], 1.0)
    opened(path, command="y").replace("chat", [figure("b", 0.1, 3)], 1.0)
    content = json.loads(path.read_text())
    assert [(row["name"], content["runs"][row["run"]]["command"]) for row in content["rows"]] == [
        ("a", "x"),
        ("b", "y"),
    ]


def test_a_checkpoint_is_known_by_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model").write_bytes(b"1")
    before = checkpoint_hash(tmp_path)
    (tmp_path / "README.md").write_text("figures")
    assert checkpoint_hash(tmp_path) == before
    (tmp_path / "sub" / "model").write_bytes(b"2")
    assert checkpoint_hash(tmp_path) != before


def test_a_card_is_filled(tmp_path):
    path = tmp_path / "r.json"
    opened(path).replace("asr", [figure("a", 0.1, 3, at_most=0.2)], 1.0)
    results = json.loads(path.read_text())
    card = filled("# nano\n<!-- figures -->\nold\n<!-- end of figures -->\nmore\n", results)
    assert "| a | 0.100 | ≤ 0.200 | yes | 3 |" in card and "old" not in card and card.endswith("more\n")
    assert filled(card, results) == card
    with pytest.raises(RequestError, match="no place"):
        filled("# nano\n", results)
    with pytest.raises(RequestError, match="names no runs"):
        figures({"rows": []})


def test_the_bundled_card_is_current():
    card = CARD.read_text(encoding="utf-8")
    assert has_place(card)
    assert filled(card, json.loads(RESULTS.read_text(encoding="utf-8"))) == card
