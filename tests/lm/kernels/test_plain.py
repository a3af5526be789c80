"""The oracles beside the model's own operations, the stored forms of weights, and who decides about kernels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stepaudio.lm.attention import alibi_slopes, sqrt_alibi_attention
from stepaudio.lm.kernels import available, tiles
from stepaudio.lm.kernels.attention import decode_attention, prefill_attention
from stepaudio.lm.kernels.linear import Norm, QuantLinear, dense_gemv, linear, quantise
from stepaudio.lm.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from stepaudio.lm.kernels.quantise import PRECISIONS, pack, unpack
from stepaudio.lm.kernels.workspace import Workspace
from stepaudio.lm.modeling import Step1RMSNorm
from tokenizer.errors import RequestError

CPU = torch.device("cpu")


def test_prefill_and_decode_are_the_models_attention():
    query, cache = torch.randn(1, 9, 6, 16), torch.randn(2, 1, 2, 14, 16)
    slopes, start = alibi_slopes(6), torch.tensor([5], dtype=torch.int32)
    options = {"scaling": 0.25, "slopes": slopes, "query_start": 5}
    expected, _ = sqrt_alibi_attention(torch.nn.Identity(), query.transpose(1, 2), *cache, None, **options)
    found = prefill_attention(query, *cache, start, torch.tensor([9], dtype=torch.int32), slopes, 0.25)
    torch.testing.assert_close(found, expected)
    last = decode_attention(query[:, -1], *cache, torch.tensor([14], dtype=torch.int32), slopes, 0.25)
    torch.testing.assert_close(last, expected[:, -1])


def test_rows_that_do_not_count_give_zeros_and_see_nothing_beyond_their_end():
    query, cache = torch.randn(2, 4, 16), torch.randn(2, 2, 2, 8, 16)
    cache[:, 1, :, 3:] = torch.nan
    sizes = torch.tensor([0, 3], dtype=torch.int32)
    found = decode_attention(query, *cache, sizes, alibi_slopes(4), 0.25)
    assert not found[0].any() and torch.isfinite(found[1]).all()


def test_newest_token_is_written():
    cache, new = torch.zeros(2, 2, 1, 8, 16), torch.randn(2, 2, 1, 16)
    sizes = torch.tensor([3, 0], dtype=torch.int32)
    decode_attention(torch.randn(2, 4, 16), *cache, sizes, alibi_slopes(4), 0.25, new=(new[0], new[1]))
    assert torch.equal(cache[:, 0, 0, 2], new[:, 0, 0])
    cache[:, 0, :, 2] = 0
    assert not cache.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_silu_round_as_the_model(dtype):
    norm = Step1RMSNorm(48, 1e-5).to(dtype)
    norm.weight.data.uniform_()
    x, residual = torch.randn(2, 3, 48).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))
    normed, total = add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, norm(total))
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.0), ("int8", 0.012), ("fp8", 0.03), ("int4", 0.11)])
@pytest.mark.parametrize("features", [200, 384])
def test_stored_weights_stay_close(precision, error, features):
    weight = torch.randn(37, features, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, precision)
    back = unpack(packed)
    assert back.shape == weight.shape
    assert ((back - weight).square().mean() / weight.square().mean()).sqrt() <= error
    assert packed.nbytes <= {"bfloat16": 4, "int8": 1.4, "fp8": 1.2, "int4": 0.8}[precision] * weight.numel()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_and_extremes_are_kept(precision):
    weight = torch.zeros(3, 128)
    weight[1, 5], weight[2, :2] = 7.0, torch.tensor([-1e4, 1e4])
    back = unpack(pack(weight, precision))
    assert torch.isfinite(back).all() and back[0].abs().max() < 1e-9
    torch.testing.assert_close(back.abs().amax(1), weight.abs().amax(1), rtol=0.2, atol=1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_is_the_product_with_what_is_stored(precision):
    projection = quantise(torch.randn(24, 130), precision)
    assert isinstance(projection, QuantLinear) and projection.nbytes == projection.packed.nbytes
    x, residual, norm = torch.randn(2, 3, 130), torch.randn(2, 3, 24), Norm(torch.rand(130), 1e-5)
    torch.testing.assert_close(projection(x), x @ projection.dequantise().T)
    expected = residual + F.linear(rms_norm(x, norm.weight, 1e-5), projection.dequantise())
    torch.testing.assert_close(linear(x, projection.packed, norm, residual), expected)
    torch.testing.assert_close(linear(x, projection.packed, silu=True), silu_mul(projection(x)))
    torch.testing.assert_close(dense_gemv(x, projection.dequantise()), projection(x))


def test_unknown_precision_is_named():
    with pytest.raises(RequestError, match=r"'int3'.*bfloat16, int8, fp8, int4"):
        quantise(torch.zeros(2, 2), "int3")


def test_every_shape_of_both_models_has_a_tile():
    for columns, features in ((3584, 3072), (3072, 8192), (74752, 3072), (62464, 12288), (12288, 15616), (5, 31232)):
        for precision in PRECISIONS:
            data = torch.empty(columns, features, dtype=torch.bfloat16, device="meta")
            if precision == "fp8":
                data = data.to(torch.float8_e4m3fn)
            packed = tiles.Packed(precision, data, None, features)
            assert tiles.gemv_tile(packed, False).chunks == 32 * tiles.gemv_tile(packed, False).warps
            assert tiles.gemv_tile(packed, True).rows >= 2
            for rows in (2, 16, 17, 64):
                tile = tiles.skinny_tile(packed, rows)
                assert tile.rows >= rows and -(-columns // tile.columns) * tile.split <= 16384 * 8


def test_reasons_against_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fresh = available.reason_against.__wrapped__
    assert "cpu" in fresh(CPU) or "triton" in fresh(CPU)
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert fresh(CPU) == "the package triton is not installed"
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    cuda = torch.device("cuda", 0)
    assert fresh(cuda) is None and fresh(cuda, "int4") is None
    assert fresh(cuda, "fp8") == "fp8 kernels need compute capability 8.9, this GPU has 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in fresh(cuda)
    assert "mps" in fresh(torch.device("mps"))


def test_workspace_grows_and_keeps_what_graphs_may_use():
    workspace = Workspace(CPU, floats=4)
    first, counters = workspace.take(3, 2)
    second, _ = workspace.take(9, 2)
    assert second.numel() == 9 and first.numel() == 4 and not counters.any()


def test_the_plain_path_loads_no_triton():
    probe = (
        "import sys, torch\nfrom stepaudio.lm.kernels.linear import quantise\n"
        "import stepaudio.lm.kernels.attention\nquantise(torch.zeros(4, 8), 'int8')(torch.zeros(1, 8))\n"
        "print(any(name.startswith('stepaudio.lm.kernels.jit') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
