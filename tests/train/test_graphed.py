"""A step and its graph, cuts of features by tensors, averages and the fused Snake: each beside its plain form."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cosyvoice.hift import Snake
from stepaudio.train.averaging import averaged, follow
from stepaudio.train.crops import Crops
from stepaudio.train.features import Features
from stepaudio.train.graphed import GraphedStep
from stepaudio.train.loop import LoopConfig, Optimise

CPU = torch.device("cpu")


class Toy:
    """Two layers that learn to add up their inputs."""

    def __init__(self, device, graphs):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
        self.optimise = Optimise(self, LoopConfig(steps=100, rate=1e-2), device)
        self.graphed = GraphedStep(device, graphs)

    def optimised(self):
        return {"all": list(self.model.parameters())}

    def learn(self, x):
        loss = F.mse_loss(self.model(x)[:, 0], x.sum(dim=1))
        self.optimise("all", loss)
        return {"loss": loss.detach()}

    def losses(self, steps):
        generator = torch.Generator().manual_seed(1)
        logged = []
        for step in range(steps):
            self.optimise.set_rate(1e-2 / (1 + step))
            x = torch.randn(4 + 2 * (step % 2), 8, generator=generator)
            logged.append(self.graphed(self.learn, x, kind="toy")["loss"])
        return torch.stack(logged)


def test_a_step_runs_once_per_call():
    assert torch.equal(Toy(CPU, True).losses(9), Toy(CPU, False).losses(9))


@pytest.mark.gpu
def test_a_graph_learns_what_the_step_learns():
    device = torch.device("cuda")
    toy = Toy(device, True)
    ours, plain = toy.losses(30), Toy(device, False).losses(30)
    difference = (ours - plain).abs()
    print(f"losses: max {difference.max():.2e}, mean {difference.mean():.2e}")
    assert len(toy.graphed) == 2 and len(set(ours.tolist())) == 30
    assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-4)


def test_crops_are_gathered_rows():
    lengths = np.array([5, 9, 3, 7])
    features = Features(torch.randn(24, 4).half(), np.cumsum(lengths))
    crops = Crops(features)
    clips, starts = torch.tensor([1, 3, 0]), torch.tensor([4, 0, 1])
    assert torch.equal(crops.take(clips, starts, 4), features.gather([1, 3, 0], 4, [4, 0, 1])[0])
    assert torch.equal(crops.repeat(clips, starts, 11), features.repeat([1, 3, 0], 11, [4, 0, 1]))
    past = crops.take(torch.tensor([2]), torch.tensor([1]), 5)
    assert torch.equal(past[0, 2:], features.whole(2)[-1:].expand(3, 4))


def test_the_average_forgets_the_beginning():
    model = nn.Linear(1, 1, bias=False)
    average = averaged(model)
    assert not average.weight.requires_grad
    seen = []
    for step in range(2000):
        model.weight.data.fill_(step / 2000)
        follow(average, model, step)
        seen.append(average.weight.item())
    assert seen[8] == seen[0] and seen[9] == pytest.approx(9 / 2000)
    assert 0.9 < seen[-1] < 0.97  # a mean over about the last sixteenth


SNAKE = """
import torch
from cosyvoice.hift import Snake
from stepaudio.train.snake import fused_snake
torch.manual_seed(0)
for shape in ((2, 3, 5), (2, 4, 300), (1, 5, 1500)):
    x, up, snake = torch.randn(shape, requires_grad=True), torch.randn(shape), Snake(shape[1])
    snake.alpha.data.uniform_(0.3, 2)
    plain, ours = snake(x), fused_snake(x, snake.alpha)
    pairs = [(plain, ours), *zip(*(torch.autograd.grad(y, (x, snake.alpha), up) for y in (plain, ours)))]
    for (a, b), name in zip(pairs, ("value", "gradient", "gradient of alpha")):
        difference = (a - b).abs()
        print(f"{shape} {name}: max {difference.max():.1e}, mean {difference.mean():.1e}")
        assert difference.max() < 5e-5
"""


def test_snake_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SNAKE], env=settings, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 96, 257), (4, 48, 2049)])
def test_snake_kernels_on_the_device(shape):
    from stepaudio.train.snake import fused_snake

    x, up = torch.randn(2, *shape, device="cuda")
    x.requires_grad_()
    snake = Snake(shape[1]).to("cuda")
    snake.alpha.data.uniform_(0.3, 2)
    plain, ours = snake(x), fused_snake(x, snake.alpha)
    assert torch.allclose(plain, ours, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (x, snake.alpha), up) for y in (plain, ours))):
        difference = (a - b).abs()
        print(f"{shape}: max {difference.max():.2e}, mean {difference.mean():.2e}")
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-2 if a.ndim == 1 else 1e-4)
