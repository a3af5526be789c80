from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.sanm import SanmConfig, SanmEncoder

TINY = SanmConfig(size=16, heads=2, feed_forward=24, layers=3, kernel=11, input_size=20, dropout=0.0)


def encoder(dtype: torch.dtype = torch.float64) -> SanmEncoder:
    torch.manual_seed(0)
    model = SanmEncoder(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def one_chunk_at_a_time(model: SanmEncoder, clip: Tensor) -> Tensor:
    """Formats.md 5.4, step E, as the release computes it: [T, input] -> [T, D]."""
    overlap = clip.new_zeros(5, clip.shape[1])
    caches: dict[int, tuple[Tensor, Tensor]] = {}
    out, position = [], 0
    half = clip.shape[1] // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    for chunk in clip.split(4):
        angles = torch.arange(position + 1, position + len(chunk) + 1)[:, None] * rates
        position += len(chunk)
        h = chunk * math.sqrt(model.config.size) + torch.cat([angles.sin(), angles.cos()], 1).to(clip.dtype)
        x = torch.cat([overlap, h])
        overlap = x[-5:]
        for number, layer in enumerate([*model.encoders0, *model.encoders]):
            q, k, v = layer.self_attn.linear_q_k_v(layer.norm1(x)).chunk(3, dim=1)
            old = caches.get(number, (k[:0], v[:0]))
            keys, values = torch.cat([old[0], k]), torch.cat([old[1], v])
            new = len(x) - 5
            caches[number] = (torch.cat([old[0], k[:new]])[-16:], torch.cat([old[1], v[:new]])[-16:])
            heads = []
            for a, b, c in zip(*(t.chunk(model.config.heads, dim=1) for t in (q, keys, values))):
                heads.append(((a / math.sqrt(a.shape[1])) @ b.T).softmax(dim=1) @ c)
            memory = F.conv1d(v.T[None], layer.self_attn.fsmn_block.weight, padding=5, groups=v.shape[1])[0].T + v
            y = layer.self_attn.linear_out(torch.cat(heads, 1)) + memory
            x = y if number == 0 else x + y
            x = x + layer.feed_forward.w_2(layer.feed_forward.w_1(layer.norm2(x)).relu())
        out.append(model.after_norm(x)[-len(chunk) :])
    return torch.cat(out)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 11, 16, 20, 24, 37])
def test_all_chunks_at_once_are_one_chunk_at_a_time(length: int) -> None:
    model, clip = encoder(), rows(length, 20)
    torch.testing.assert_close(model(clip[None])[0], one_chunk_at_a_time(model, clip), atol=1e-5, rtol=0)


def test_gradients_are_those_of_one_chunk_at_a_time() -> None:
    model, lengths = encoder(), [27, 6, 1]
    batch = rows(3, 27, 20).requires_grad_()
    grades = rows(3, 27, 16, seed=1)
    parameters = [batch, *model.parameters()]
    out = model(batch, torch.tensor(lengths))
    ours = torch.autograd.grad(sum((out[i, :n] * grades[i, :n]).sum() for i, n in enumerate(lengths)), parameters)
    singles = [one_chunk_at_a_time(model, batch[i, :n]) for i, n in enumerate(lengths)]
    plain = torch.autograd.grad(sum((o * grades[i, : len(o)]).sum() for i, o in enumerate(singles)), parameters)
    for found, expected in zip(ours, plain):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_neighbours_and_padding_do_not_matter() -> None:
    model, lengths = encoder(), [1, 30, 4, 17, 18]
    batch = torch.full((5, 30, 20), 1e3).double()
    clips = [rows(n, 20, seed=n) for n in lengths]
    for i, clip in enumerate(clips):
        batch[i, : len(clip)] = clip
    out = model(batch, torch.tensor(lengths))
    assert out.shape == (5, 30, 16) and out.isfinite().all()
    for i, clip in enumerate(clips):
        torch.testing.assert_close(out[i, : len(clip)], model(clip[None])[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("blocks", [[4] * 9 + [3], [8, 4, 20, 7], [32, 7], [36, 3]])
def test_blocks_give_the_whole_and_states_are_values(blocks: list[int]) -> None:
    model, clips = encoder(), rows(2, sum(blocks), 20)
    whole = model(clips)
    state, out = model.start(2), []
    for block in clips.split(blocks, dim=1):
        again, _ = model.step(block, None, state)
        found, state = model.step(block, None, state)
        assert torch.equal(found, again)
        out.append(found)
    torch.testing.assert_close(torch.cat(out, dim=1), whole, atol=1e-5, rtol=0)


def test_a_selected_stream_goes_on_alone() -> None:
    model, clips = encoder(), rows(3, 24, 20)
    _, state = model.step(clips[:, :8], None, model.start(3))
    out, _ = model.step(clips[[2, 0], 8:], None, state.select([2, 0]))
    torch.testing.assert_close(out, model(clips)[[2, 0], 8:], atol=1e-5, rtol=0)


def test_nothing_follows_a_short_chunk() -> None:
    model = encoder()
    _, state = model.step(rows(1, 6, 20), None, model.start(1))
    with pytest.raises(AssertionError, match="6 rows"):
        model.step(rows(1, 4, 20), None, state)


def test_names_and_shapes_are_the_releases(golden: Path) -> None:
    expected = json.loads((golden / "manifests" / "paraformer_encoder.json").read_text())
    with torch.device("meta"):
        model = SanmEncoder(SanmConfig())
    found = {f"encoder.{name}": list(value.shape) for name, value in model.state_dict().items()}
    assert found == {name: shape for name, shape in expected.items() if name != "_meta"}


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    model, clips = SanmEncoder(SanmConfig(16, 2, 24, 2, input_size=20, dropout=0.5)), rows(1, 8, 20).float()
    assert not torch.equal(model(clips), model(clips))
    model.eval()
    assert torch.equal(model(clips), model(clips))
