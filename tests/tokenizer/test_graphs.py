"""Captured calls: the results of the plain call, shapes checked, a bounded number, calls from several threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tokenizer.errors import RequestError
from tokenizer.graphs import Graph, GraphPool, check_shapes


def call(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.relu(x @ y)
    return z, z.sum(dim=0)


def test_another_shape_names_the_switch() -> None:
    with pytest.raises(RequestError, match=r'given \[\(\(3, 4\), torch.float32\)\]: engine="plain" runs without'):
        check_shapes([torch.zeros(2, 4)], [torch.zeros(3, 4)], 'engine="plain"')
    with pytest.raises(RequestError, match="int64"):
        check_shapes([torch.zeros(2)], [torch.zeros(2, dtype=torch.long)], "x")
    check_shapes([torch.zeros(2)], [torch.ones(2)], "x")


@pytest.mark.gpu
def test_a_graph_gives_what_the_call_gives() -> None:
    x, y = torch.randn(5, 8, device="cuda"), torch.randn(8, 3, device="cuda")
    graph = Graph(call, (x, y))
    for _ in range(3):
        x = torch.randn_like(x)
        for got, wanted in zip(graph(x, y), call(x, y)):
            assert torch.equal(got, wanted)
    with pytest.raises(RequestError, match="was given"):
        graph(x[:2], y)


@pytest.mark.gpu
def test_a_pool_is_bounded_and_its_results_stay() -> None:
    pool, y = GraphPool(torch.device("cuda", 0), limit=3), torch.randn(8, 3, device="cuda")
    inputs = {size: torch.randn(size, 8, device="cuda") for size in (1, 2, 3, 4, 5, 1, 2)}
    done = {size: pool.run(size, call, x, y) for size, x in inputs.items()}
    for size, x in inputs.items():
        for got, wanted in zip(done[size], call(x, y)):
            assert torch.equal(got, wanted)
    assert len(pool) == 3 and pool.bytes >= 0
    pool.clear()
    assert len(pool) == 0
    assert torch.equal(pool.run(1, call, inputs[1], y)[0], call(inputs[1], y)[0])


@pytest.mark.gpu
def test_threads_take_turns() -> None:
    pool, y = GraphPool(torch.device("cuda", 0), limit=2), torch.randn(64, 64, device="cuda")
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(40):
                x = torch.randn(16 + 16 * (step % 3), 64, device="cuda", generator=generator)
                got, _ = pool.run(len(x), call, x, y)
                if not torch.allclose(got, call(x, y)[0], atol=1e-4):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
