"""The kernels on a GPU against float64 on odd shapes, inside graphs, and with early launches against none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stepaudio.lm.attention import alibi_slopes
from stepaudio.lm.kernels import attention, available, linear, tiles
from stepaudio.lm.kernels.quantise import PRECISIONS, pack

pytestmark = pytest.mark.gpu
_spec = importlib.util.spec_from_file_location("kernel_cases", Path(__file__).with_name("cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

CUDA = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS = [(48, 4, 64), (96, 8, 128), (6, 2, 64)]
LENGTHS = [[1], [2, 0, 63], [64, 65, 127, 128, 129], [1000, 1, 1023, 1024, 1025, 7, 8193], [8192], [4097] * 3]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(heads):
    for lengths in LENGTHS:
        assert cases.decode_case(CUDA, BF16, lengths, *heads, max(lengths) + 5) <= 1
    for lengths in LENGTHS[1:4]:
        assert cases.decode_case(CUDA, FP32, lengths, *heads, max(lengths) + 5) <= 1
    assert cases.decode_case(CUDA, FP16, LENGTHS[3], *heads, 8200, new=True) <= 1


def test_decode_of_many_rows():
    lengths = [1 + 37 * row % 1100 for row in range(64)]
    assert cases.decode_case(CUDA, BF16, lengths, 48, 4, 64, 1104, new=True) <= 1


PREFILLS = [([0], [1], 1), ([0, 17], [5, 13], 16), ([0], [1000], 1000), ([300, 0, 1], [129, 0, 65], 130)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill(heads):
    for starts, lengths, rows in [*PREFILLS, ([8000], [193], 193), ([0], [50], 50)]:
        assert cases.prefill_case(CUDA, BF16, starts, lengths, rows, *heads) <= 1
    for starts, lengths, rows in PREFILLS[1:]:
        assert cases.prefill_case(CUDA, FP32, starts, lengths, rows, *heads) <= 1
    assert cases.prefill_case(CUDA, FP16, *PREFILLS[3], *heads) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("columns", "features"), [(3584, 3072), (17, 200), (130, 15616)])
def test_linear(precision, columns, features):
    for rows, fused in ((1, False), (1, True), (2, True), (7, False), (8, False), (33, False), (64, False), (65, True)):
        assert cases.linear_case(CUDA, BF16, precision, rows, columns, features, fused) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_of_long_rows(precision):
    assert cases.linear_case(CUDA, BF16, precision, 1, 1029, 31232) <= 1
    assert cases.linear_case(CUDA, FP16, precision, 1, 3072, 8192) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_silu(precision):
    for rows in (1, 3, 65):
        assert cases.silu_case(CUDA, BF16, precision, rows, 333, 3072) <= 1


@pytest.mark.parametrize("width", [1, 100, 384, 3072, 12288, 16384])
def test_pointwise(width):
    for dtype in (BF16, FP16):
        assert cases.pointwise_case(CUDA, dtype, 5, width) <= 1


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_dequantise(precision):
    assert cases.dequantise_case(CUDA, BF16, precision, 300, 1000) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_to_choose_from(precision):
    random = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(517, 3072, generator=random).to(CUDA, BF16), precision)
    for rows, choices in ((1, tiles.gemv_choices(packed)[::5]), (5, tiles.skinny_choices(packed, 5)[1::5])):
        x = torch.randn(rows, 3072, generator=random).to(CUDA, BF16)
        usual = linear.linear(x, packed)
        for tile in choices:
            with tiles.forced(tile):
                torch.testing.assert_close(linear.linear(x, packed), usual, rtol=0.02, atol=0.5)


class Layer:
    """One layer's kernels in the order of a decode step."""

    def __init__(self, precision, rows):
        random = torch.Generator().manual_seed(rows)
        width, inner, self.heads, self.groups, self.size = 768, 1024, 12, 1, 64
        shapes = ((width + 128, width), (width, width), (2 * inner, width), (width, inner))
        self.qkv, self.out, self.gate_up, self.down = (
            pack((torch.randn(shape, generator=random) * shape[1] ** -0.5).to(CUDA, BF16), precision)
            for shape in shapes
        )
        self.norm = linear.Norm(torch.ones(width, device=CUDA, dtype=BF16), 1e-5)
        self.cache = torch.zeros(2, rows, 1, 300, 64, device=CUDA, dtype=BF16)
        self.x = torch.randn(rows, width, generator=random).to(CUDA, BF16)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=CUDA)
        self.slopes = alibi_slopes(12).to(CUDA)

    def step(self):
        self.lengths += 1
        x = self.x
        for _ in range(6):
            qkv = linear.linear(x, self.qkv, self.norm)
            query, key, value = qkv[:, :768].unflatten(1, (12, 64)), qkv[:, 768:832], qkv[:, 832:]
            new = (key.unflatten(1, (1, 64)), value.unflatten(1, (1, 64)))
            seen = attention.decode_attention(query, *self.cache, self.lengths, self.slopes, 0.125, new=new)
            x = linear.linear(seen.flatten(1), self.out, residual=x)
            x = linear.linear(linear.linear(x, self.gate_up, self.norm, silu=True), self.down, residual=x)
        return x


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 6])
def test_graph_and_early_launch_change_nothing(precision, rows, monkeypatch):
    steps = 200
    captured = Layer(precision, rows)
    captured.step()
    captured.lengths.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured.step()
    captured.lengths.zero_()
    found = []
    for _ in range(steps):
        graph.replay()
        found.append(result.clone())
    monkeypatch.setattr(available, "launch_options", lambda device: {"EARLY": False})
    plain = Layer(precision, rows)
    expected = [plain.step() for _ in range(steps)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.isfinite(expected[-1]).all()


def test_dense_gemv_beside_torch():
    x = torch.randn(4, 1, 3072, device=CUDA, dtype=BF16)
    weight = torch.randn(300, 3072, device=CUDA, dtype=BF16)
    torch.testing.assert_close(linear.dense_gemv(x, weight), F.linear(x, weight), rtol=0.02, atol=0.5)
