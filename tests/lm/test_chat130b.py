"""The measurement of the 130B shapes, on a model small enough for a CPU: its rows, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from stepaudio.bench.chat130b import CONTEXTS, Case, Plan, measure, plan_for
from stepaudio.lm.geometry import Geometry
from tokenizer.errors import RequestError

SMALL = Geometry(300, 48, 80, 6, 2, 2, 512)


def test_rows_of_a_small_model() -> None:
    cases = [Case("int4", 1), Case("bfloat16", 3)]  # three ranks: the second case does not split and is left out
    plan = Plan(torch.device("cpu"), torch.float32, (100, 128), 50, SMALL, cases)
    rows = list(measure(plan))
    names = [row["name"] for row in rows]
    assert names == [
        "memory copy",
        "130b int4, 1 GPU, made",
        "130b int4, 1 GPU, token at context 100",
        "130b int4, 1 GPU, token at context 128",
        "130b int4, 1 GPU, prefill of 50 tokens",
        "130b bfloat16, 3 GPUs",
    ]
    assert all(row["median"] > 0 and row["unit"] == "ms" and row["layers"] == 2 for row in rows[1:5])
    assert rows[2]["repeats"] == 40 and rows[2]["tb_per_s"] >= 0
    assert "--tensor-parallel 3 does not divide" in rows[5]["skipped"]


def test_what_is_refused() -> None:
    with pytest.raises(RequestError, match="needs a CUDA device, not cpu"):
        plan_for(torch.device("cpu"))
    cuda = torch.device("cuda", 0)
    with pytest.raises(RequestError, match=r"--context must lie in 96..32768"):
        plan_for(cuda, (64,))
    with pytest.raises(RequestError, match=r"--layers 89 must lie in 1..88"):
        plan_for(cuda, CONTEXTS, 89)
    assert plan_for(cuda, CONTEXTS, 2).geometry.num_hidden_layers == 2
