import math

import pytest
import torch

from cosyvoice.config import EncoderConfig
from cosyvoice.conformer import ConformerEncoder, RelativeAttention, relative_positions, relative_shift

TINY = EncoderConfig(input_size=12, output_size=16, attention_heads=2, linear_units=24, num_blocks=2)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ConformerEncoder(TINY)


def test_position_rows_run_from_past_to_future():
    table = relative_positions(4, 6, torch.device("cpu"), torch.float32)
    assert table.shape == (7, 6)
    for row, offset in enumerate([3, 2, 1, 0, -1, -2, -3]):
        for pair in range(3):
            angle = offset * math.exp(-math.log(10000) * 2 * pair / 6)
            assert table[row, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[row, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_shift_takes_the_offset_of_query_and_key(length):
    scores = torch.randn(2, 3, length, 2 * length - 1)
    shifted = relative_shift(scores)
    for i in range(length):
        for j in range(length):
            assert torch.equal(shifted[:, :, i, j], scores[:, :, i, length - 1 - (i - j)])


def test_attention_is_the_written_out_sum():
    torch.manual_seed(1)
    attention = RelativeAttention(8, 2)
    x, length, heads, width = torch.randn(1, 5, 8), 5, 2, 4
    positions = relative_positions(length, 8, x.device, x.dtype)
    q, k, v = (
        layer(x)[0].view(length, heads, width) for layer in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    p = attention.linear_pos(positions).view(-1, heads, width)
    mixed = torch.zeros(length, heads, width)
    for h in range(heads):
        scores = torch.zeros(length, length)
        for i in range(length):
            for j in range(length):
                content = (q[i, h] + attention.pos_bias_u[h]) @ k[j, h]
                position = (q[i, h] + attention.pos_bias_v[h]) @ p[length - 1 - (i - j), h]
                scores[i, j] = (content + position) / 2
        mixed[:, h] = scores.softmax(-1) @ v[:, h]
    expected = attention.linear_out(mixed.flatten(1))
    assert torch.allclose(attention(x, positions)[0], expected, atol=1e-6)


def test_padding_changes_nothing(encoder):
    lengths = [7, 3, 5]
    rows = [torch.randn(n, 12) for n in lengths]
    padded = torch.full((3, 7, 12), 1e3)
    for row, data in zip(padded, rows):
        row[: len(data)] = data
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    together = encoder(padded, mask)
    for out, row in zip(together, rows):
        assert torch.allclose(out[: len(row)], encoder(row[None])[0], atol=1e-5)


def test_gradients_reach_every_parameter(encoder):
    x = torch.randn(2, 6, 12, requires_grad=True)
    encoder(x, torch.arange(6) < torch.tensor([6, 4])[:, None])[1, :4].square().sum().backward()
    assert x.grad[1, 4:].abs().max() == 0
    assert x.grad[0].abs().max() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
