"""A model in two processes against the same model in one: tokens, batches, streams that end early, bad input, death."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepaudio.lm.base import SamplingParams, StopReason, Token
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused_load import load_fused, random_fused
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.open import open_lm
from stepaudio.lm.parallel import ParallelLM
from stepaudio.lm.workers import WorkerLostError, devices_for
from tokenizer.errors import RequestError

GREEDY = SamplingParams(temperature=0, stop_ids=(), max_new_tokens=30)
SMALL = Geometry(4099, 1024, 1536, 8, 2, 3, 2048)


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "step1_lm" / "A"


@pytest.fixture(scope="module")
def single(folder: Path) -> FastLM:
    return FastLM(load_fused(folder, dtype=torch.float32, progress=False))


@pytest.fixture(scope="module")
def split(folder: Path) -> Iterator[ParallelLM]:
    lm = open_lm(folder, "cpu", torch.float32, tensor_parallel=2)
    assert isinstance(lm, ParallelLM)
    with lm:
        yield lm


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy and drawn, of different lengths, some ended by a stop id."""
    prompts = [list(range(4 + 3 * row, 30 + 5 * row)) for row in range(count)]
    params = [
        SamplingParams(
            temperature=0.8 * (row % 2),
            top_p=0.9,
            seed=row,
            repetition_window=10 * (row % 3),
            stop_ids=tuple(range(60)) if row > 1 else (),
            max_new_tokens=12 + 4 * row,
        )
        for row in range(count)
    ]
    return prompts, params


def test_two_processes_equal_one(split: ParallelLM, single: FastLM) -> None:
    prompts, params = requests(5)
    done = split.generate(prompts, params)
    assert done == single.generate(prompts, params)
    assert {one.stop for one in done} == {StopReason.STOP, StopReason.LENGTH}
    [long] = split.generate([prompts[0]], [replace(GREEDY, max_new_tokens=80)])
    assert [long] == single.generate([prompts[0]], [replace(GREEDY, max_new_tokens=80)])
    assert split.memory()["cache"] > 0 and split.model.groups == 1


def test_streams_run_beside_each_other_and_end_when_nobody_reads(split: ParallelLM, single: FastLM) -> None:
    prompts, params = requests(2)
    expected = single.generate(prompts, params)
    first, second = (split.stream(*one) for one in zip(prompts, params))
    read = [(next(first).id, next(second).id) for _ in range(5)]
    assert [tuple(ids) for ids in zip(*read)] == [one.ids[:5] for one in expected]
    first.close()  # the others are not waited for, and do not wait
    assert [token.id for token in second][:-1] == list(expected[1].ids[5:])
    del first, second
    tokens = list(split.stream(prompts[0], params[0], cancelled=lambda: True))
    assert tokens == [Token(expected[0].ids[0]), Token(None, StopReason.CANCELLED)]
    unread = split.stream(prompts[0], params[0])
    del unread
    assert split.generate(prompts, params) == expected


def test_without_a_seed_the_ranks_still_agree(split: ParallelLM) -> None:
    params = SamplingParams(stop_ids=(), max_new_tokens=20)
    first, second = split.generate([[5, 6, 7]] * 2, [params] * 2)
    assert len(first.ids) == 20 and first != second


def test_a_refused_request_leaves_all_in_step(split: ParallelLM, single: FastLM) -> None:
    for prompt, message in (([], "is empty"), ([5000], "prompt id 5000"), ([5] * 40_000, "over the context")):
        with pytest.raises(RequestError, match=message):
            split.generate([prompt], [GREEDY])
    limit = split.session.cache_limit
    assert limit is not None
    rows = [[5] * 30_000] * 64  # found out in `join`, by every rank
    if split.session._bytes(64, 32_768) > limit:
        with pytest.raises(RequestError, match="lower the batch size"):
            split.generate(rows, [GREEDY] * 64)
    assert split.generate([[5, 6]], [GREEDY]) == single.generate([[5, 6]], [GREEDY])


def test_refused_before_a_process_starts(folder: Path) -> None:
    with pytest.raises(RequestError, match="--tensor-parallel 4 does not divide the model's 2 key/value groups"):
        open_lm(folder, tensor_parallel=4)
    with pytest.raises(RequestError, match="--tensor-parallel 2 needs the fast engine: leave out --engine eager"):
        open_lm(folder, engine="eager", tensor_parallel=2)
    with pytest.raises(RequestError, match="--tensor-parallel 2 needs the fast engine: the layers are spread"):
        open_lm(folder, device_map="auto", tensor_parallel=2)
    with pytest.raises(RequestError, match="needs 99 CUDA devices"):
        ParallelLM.from_dir(folder, 99, "cuda")


def test_a_dead_worker_is_told_at_once(split: ParallelLM) -> None:
    """The last test with this model."""
    stream = split.stream([5, 6, 7], replace(GREEDY, max_new_tokens=500))
    next(stream)
    _kill_and_expect(split, stream)
    with pytest.raises(WorkerLostError, match="killed by signal 9"):
        split.generate([[5]], [GREEDY])


def _kill_and_expect(lm: ParallelLM, stream: Iterator[Token]) -> None:
    [process] = lm.workers._processes
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match=r"^worker 1 of 2 \(\S+\) was killed by signal 9: load the model again$"):
        list(stream)
    print(f"told after {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 15


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_two_devices() -> None:
    """Graphs with sums over both devices: equal to no graphs, close to one device, and no hang when one dies."""
    build = functools.partial(random_fused, SMALL, dtype=torch.bfloat16)
    devices = devices_for(torch.device("cuda", 0), 2)
    prompts, params = requests(4)
    params = [replace(one, max_new_tokens=60, stop_ids=()) for one in params]
    with ParallelLM(build, devices, graphs=False) as plain:
        expected = plain.generate(prompts, params)
    alone = FastLM(build(device=devices[0])).generate(prompts, params)
    lm = ParallelLM(build, devices)
    try:
        assert lm.generate(prompts, params) == expected == lm.generate(prompts, params)
        assert lm.memory()["graph_count"] > 0
        same = [sum(a == b for a, b in zip(one.ids, other.ids)) for one, other in zip(expected, alone)]
        print(f"ids equal to those of one device: {same} of 60")
        assert all(one.ids[0] == other.ids[0] for one, other in zip(expected[::2], alone[::2]))
        stream = lm.stream(prompts[0], replace(GREEDY, max_new_tokens=1500))
        next(stream)
        _kill_and_expect(lm, stream)
    finally:
        lm.close()
