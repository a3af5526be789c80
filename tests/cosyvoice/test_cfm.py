import math

import pytest
import torch
from torch import nn

from cosyvoice.cfm import ConditionalCFM, time_grid
from cosyvoice.config import EstimatorConfig, FlowConfig
from tokenizer.errors import RequestError

TINY = FlowConfig(
    output_size=4,
    estimator=EstimatorConfig(
        in_channels=16, out_channels=4, channels=(8, 8), attention_head_dim=4, n_blocks=1, num_mid_blocks=1, num_heads=2
    ),
)
FP32 = [0.0, 0.01231163740158081, 0.04894345998764038, 0.10899347066879272, 0.19098299741744995]
BF16 = [0.0, 0.01171875, 0.05078125, 0.109375, 0.19140625]


@pytest.mark.parametrize(("dtype", "start"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_time_grid_is_rounded_to_the_dtype(dtype, start):
    times, widths = time_grid(10, dtype)
    assert times.dtype == widths.dtype == dtype
    assert times[:5].tolist() == pytest.approx(start, abs=1e-7)
    assert (times[-1] + widths[-1]).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps(steps):
    times, widths = time_grid(steps, torch.float64)
    assert times.tolist() == pytest.approx([1 - math.cos(k / steps * math.pi / 2) for k in range(steps)])
    assert widths.sum().item() == pytest.approx(1.0)


def test_no_step_is_refused():
    with pytest.raises(RequestError, match="num_steps is 0"):
        time_grid(0, torch.float32)


class Recorder(nn.Module):
    """Velocity 1 with condition, 0.5 without; keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, mask, mu, t, spks, cond):
        self.calls.append((x, mask, mu, t, spks, cond))
        return torch.where((mu.abs().sum((1, 2)) > 0)[:, None, None], 1.0, 0.5).expand_as(x)


def test_guidance_mixes_two_rows_of_one_batch():
    cfm = ConditionalCFM(TINY)
    cfm.estimator = Recorder()
    noise, mu, cond = torch.randn(3, 2, 4, 5)
    out = cfm(noise, None, mu, torch.ones(2, 4), cond, num_steps=3)
    assert torch.allclose(out, noise + (1.7 * 1.0 - 0.7 * 0.5), atol=1e-6)
    assert len(cfm.estimator.calls) == 3
    x, mask, mu_rows, t, spks, cond_rows = cfm.estimator.calls[0]
    assert mask is None
    assert torch.equal(x, torch.cat([noise, noise]))
    assert torch.equal(mu_rows, torch.cat([mu, torch.zeros_like(mu)]))
    assert torch.equal(cond_rows, torch.cat([cond, torch.zeros_like(cond)]))
    assert spks.tolist() == [[1.0] * 4] * 2 + [[0.0] * 4] * 2
    assert t.shape == (4,)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    cfm = ConditionalCFM(TINY).requires_grad_(False)
    noise, mu, cond = torch.randn(3, 2, 4, 9)
    spks = torch.randn(2, 4)
    mask = (torch.arange(9) < torch.tensor([9, 5])[:, None])[:, None].float()
    together = cfm(noise, mask, mu, spks, cond)
    alone = cfm(noise[1:, :, :5], None, mu[1:, :, :5], spks[1:], cond[1:, :, :5])
    assert torch.allclose(together[1, :, :5], alone[0], atol=1e-5)
