"""The decoder's Triton kernels against the plain modules, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosyvoice.config import EstimatorConfig
from cosyvoice.fused import tile, unsupported

pytest.importorskip("triton")
HERE = Path(__file__).parent


def measured(what: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(HERE / "interpreted.py"), what]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    print(what, done.stdout)
    return json.loads(done.stdout)


def test_the_fused_flow_is_the_flow():
    """float32 to rounding, odd lengths in one padded batch; bfloat16 no farther from float32 than the modules."""
    rows = measured("flow")
    assert rows["torch.float32"]["largest"] < 1e-5
    assert rows["torch.bfloat16"]["mean"] < 1.5 * rows["plain bfloat16"]["mean"]
    assert rows["torch.bfloat16"]["largest"] < 2 * rows["plain bfloat16"]["largest"]


def test_the_fused_vocoder_is_the_vocoder():
    rows = measured("vocoder")
    assert rows["float32"]["largest"] < 2e-5 * max(1.0, rows["scale"]["largest"])
    assert rows["float16"]["largest"] < 1e-2 * rows["scale"]["largest"]


def test_sizes_that_do_not_fit_are_named():
    cpu = torch.device("cpu")
    assert unsupported(EstimatorConfig(), cpu) is None
    assert "powers of two" in unsupported(EstimatorConfig(channels=(192, 192)), cpu)
    assert "above 256" in unsupported(EstimatorConfig(channels=(512, 512)), cpu)


@pytest.mark.parametrize(("frames", "rows", "width"), [(32, 2, 256), (600, 2, 1536), (4096, 64, 256), (1, 2, 32)])
def test_a_tile_divides_the_channels(frames, rows, width):
    m, n = tile(frames, rows, width)
    assert width % n == 0 and m in (32, 64)
