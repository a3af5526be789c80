"""The kernels' arithmetic in Triton's interpreter: small odd shapes on the CPU, no GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio.lm.kernels.jit import triton

REPO = Path(__file__).resolve().parents[3]
PROBE = """
import sys
sys.path.insert(0, {here!r})
import torch
from triton.runtime import interpreter

patch = interpreter._patch_lang_tensor


def with_index(tensor, scope):  # numpy 2.4 makes no int of a one-element array any more
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = with_index
import cases

cpu, single = torch.device("cpu"), torch.float32
half = torch.float16  # bfloat16 is cut, not rounded, by the interpreter, and not multiplied
results = [{calls}]
print(results)
assert max(results) <= 1, results
"""

CALLS = {
    "attention": [
        "cases.decode_case(cpu, single, [1, 0, 37, 150], 12, 1, 64, 160)",
        "cases.decode_case(cpu, single, [131, 70], 6, 2, 16, 140, new=True)",
        "cases.decode_case(cpu, half, [65], 24, 2, 128, 70, new=True)",
        "cases.prefill_case(cpu, single, [0, 5], [19, 7], 20, 6, 2, 16)",
        "cases.prefill_case(cpu, half, [3], [70], 70, 2, 1, 64)",
        "cases.prefill_case(cpu, single, [0, 9], [0, 3], 4, 4, 4, 32)",
    ],
    "linear": [
        f"cases.linear_case(cpu, single, {precision!r}, {rows}, 19, {features}, fused={fused})"
        for precision in ("bfloat16", "fp8", "int8", "int4")
        for rows, features, fused in ((1, 200, False), (1, 384, True), (3, 200, False), (17, 320, True))
    ]
    + [
        f"cases.linear_case(cpu, half, {precision!r}, 1, 5, {features})"
        for precision, features in (("bfloat16", 5125), ("fp8", 6144), ("int8", 10000), ("int4", 20480))
    ]
    + [
        f"cases.silu_case(cpu, single, {precision!r}, {rows}, 13, 256)"
        for precision in ("bfloat16", "fp8", "int8", "int4")
        for rows in (1, 2)
    ],
    "split": [
        "cases.linear_case(cpu, single, 'bfloat16', 2, 33, 3072)",
        "cases.linear_case(cpu, half, 'int4', 9, 8, 3000)",
    ],
    "pointwise": ["cases.pointwise_case(cpu, half, 3, 384)", "cases.pointwise_case(cpu, single, 1, 100)"],
    "dequantise": [f"cases.dequantise_case(cpu, half, {precision!r}, 9, 700)" for precision in ("fp8", "int8", "int4")],
}


@pytest.mark.skipif(triton is None, reason="needs the package triton")
@pytest.mark.parametrize("name", CALLS)
def test_kernels_keep_their_bounds(name):
    probe = PROBE.format(here=str(Path(__file__).parent), calls=", ".join(CALLS[name]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
