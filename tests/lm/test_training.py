"""Step-1 in training: the loss, gradient checkpointing, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM


def small(**changes: object) -> Step1ForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 6}
    sizes |= {"num_attention_groups": 2, "num_hidden_layers": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    return Step1ForCausalLM(Step1Config(**sizes | changes)).eval()


def test_loss_is_the_shifted_cross_entropy() -> None:
    model, ids = small(), torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_checkpointed_gradients_equal_plain_ones() -> None:
    ids, mask = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(3)), torch.ones(2, 9)
    mask[0, :3] = 0
    found = []
    for saving in (False, True):
        model = small().train()
        if saving:
            model.gradient_checkpointing_enable()
        labels = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in found[0].values())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_a_small_model_learns() -> None:
    model, ids = small().train(), torch.arange(4, 44)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
