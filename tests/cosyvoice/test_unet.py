import math

import pytest
import torch
import torch.nn.functional as F

from cosyvoice.config import EstimatorConfig
from cosyvoice.unet import ConditionalDecoder, MaskedGroupNorm, time_frequencies

TINY = EstimatorConfig(
    in_channels=16, out_channels=4, channels=(16, 24), attention_head_dim=8, n_blocks=1, num_mid_blocks=1, num_heads=2
)


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    return ConditionalDecoder(TINY)


def inputs(batch, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, mu, cond = torch.randn(3, batch, 4, frames, generator=generator)
    return x, mu, torch.rand(batch, generator=generator), torch.randn(batch, 4, generator=generator), cond


def test_time_frequencies():
    t = torch.tensor([0.0, 0.25])
    out = time_frequencies(t, 8)
    rates = [math.exp(-math.log(10000) * k / 3) for k in range(4)]
    assert out[0].tolist() == [0.0] * 4 + [1.0] * 4
    expected = [math.sin(250 * rate) for rate in rates] + [math.cos(250 * rate) for rate in rates]
    assert out[1].tolist() == pytest.approx(expected, abs=2e-5)
    assert time_frequencies(t.bfloat16(), 8).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 4])
def test_masked_group_norm_sees_valid_frames_only(groups):
    torch.manual_seed(0)
    norm = MaskedGroupNorm(groups, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 8, 9) * 5 + 100
    lengths = [9, 4, 1]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None])[:, None].float()
    out = norm(x, mask)
    for row, data, length in zip(out, x, lengths):
        alone = F.group_norm(data[None, :, :length], groups, norm.weight, norm.bias, norm.eps)[0]
        assert torch.allclose(row[:, :length], alone, atol=2e-5)
    assert torch.equal(norm(x), F.group_norm(x, groups, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("lengths", [(12, 7, 1), (11, 11, 2), (5, 6, 3), (2, 1, 1)])
def test_padding_changes_nothing(estimator, lengths):
    frames = max(lengths)
    x, mu, t, spks, cond = inputs(3, frames)
    mask = (torch.arange(frames) < torch.tensor(lengths)[:, None])[:, None].float()
    together = estimator(x, mask, mu, t, spks, cond)
    for i, length in enumerate(lengths):
        alone = estimator(
            x[i : i + 1, :, :length],
            None,
            mu[i : i + 1, :, :length],
            t[i : i + 1],
            spks[i : i + 1],
            cond[i : i + 1, :, :length],
        )
        assert alone.shape == (1, 4, length)
        assert torch.allclose(together[i, :, :length], alone[0], atol=1e-5)
        assert (together[i, :, length:] == 0).all()


def test_full_mask_and_no_mask_agree(estimator):
    x, mu, t, spks, cond = inputs(2, 13)
    masked = estimator(x, torch.ones(2, 1, 13), mu, t, spks, cond)
    assert torch.allclose(masked, estimator(x, None, mu, t, spks, cond), atol=1e-5)


def test_gradients(estimator):
    x, mu, t, spks, cond = inputs(2, 9)
    mu.requires_grad_()
    mask = (torch.arange(9) < torch.tensor([9, 5])[:, None])[:, None].float()
    estimator.zero_grad()
    estimator(x, mask, mu, t, spks, cond).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in estimator.parameters())
    assert mu.grad[1, :, 5:].abs().max() == 0
    assert mu.grad[1, :, :5].abs().min() > 0
