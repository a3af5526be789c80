"""`stepaudio bench flow|vocoder|tokenizer`: rows of the plain path on a CPU, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepaudio.bench import decoder, tokenizer
from stepaudio.commands.bench import add_arguments, run_command
from tokenizer.errors import RequestError

CPU = torch.device("cpu")


@pytest.mark.parametrize("what", ["flow", "vocoder"])
def test_decoder_rows(tiny: Path, what: str) -> None:
    plan = decoder.Plan(CPU, torch.float32, lengths=(0.5,), repeats=1, folder=tiny)
    [row] = decoder.measure(plan, what)
    assert row["name"] == f"{what}, 0.5 s, batch 1, plain" and row["engine"] == "plain"
    assert row["median"] > 0 and row["times_real_time"] > 0 and row["peak_mb"] > 0


def test_tokenizer_rows(tiny: Path) -> None:
    rows = list(tokenizer.measure(tokenizer.Plan(CPU, (0.5,), batch_seconds=0.5, batch=2, repeats=1, folder=tiny)))
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["median"] > 0 for row in rows)


def test_rows_that_would_begin_too_late_are_named(tiny: Path) -> None:
    plan = decoder.Plan(CPU, torch.float32, lengths=(0.5,), folder=tiny, seconds=-1.0)
    assert [row["skipped"] for row in decoder.measure(plan, "flow")] == ["began after -1 s"]


def test_random_must_fit_the_name() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(RequestError, match="3b is a language model: use full"):
        run_command(parser.parse_args(["flow", "--random", "3b", "--device", "cpu"]))
    with pytest.raises(RequestError, match="full is for flow, vocoder and tokenizer"):
        run_command(parser.parse_args(["lm", "--random", "full", "--device", "cpu"]))
