"""Processes in step: they start, listen and end; what dies, fails, hangs or never starts is told in one line."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from stepaudio.lm import workers
from stepaudio.lm.workers import Seat, WorkerLostError, Workers, devices_for
from tokenizer.errors import RequestError

CPUS = [torch.device("cpu")] * 2


def listen(seat: Seat, connection: Connection) -> None:
    """Adds up what rank 0 says, dies on None, falls silent on "sleep"; "fail" is an error a user can mend."""
    connection.send(str(seat))
    while True:
        message = connection.recv()
        if message is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if message == "sleep":
            time.sleep(60)
        if message == "fail":
            raise RequestError("the weights are gone")
        part = torch.tensor([float(message)])
        dist.all_reduce(part)


def fail(reason: str, seat: Seat, connection: Connection) -> None:
    raise RequestError(reason)


@pytest.fixture
def group() -> Iterator[Workers]:
    workers = Workers(listen, CPUS)
    assert workers.gather() == ["worker 1 of 2 (cpu)"]
    workers.watch()
    yield workers
    workers.close()
    workers.close()
    assert not dist.is_initialized() and not any(process.is_alive() for process in workers._processes)
    with pytest.raises(WorkerLostError):
        workers.send(1.0)


def summed(group: Workers, message: float | str | None) -> float:
    group.send(message)
    part = torch.tensor([2.0])
    with group.working():
        dist.all_reduce(part)
    return part.item()


def test_in_step_until_one_dies(group: Workers) -> None:
    assert [summed(group, number) for number in (1.0, 5.0)] == [3.0, 7.0]
    with pytest.raises(RequestError, match="in use in this process"):
        Workers(listen, CPUS)
    with pytest.raises(RequestError, match="not a fault"), group.working():
        raise RequestError("not a fault of the group")
    assert summed(group, 3.0) == 5.0
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(
            WorkerLostError, match=r"^worker 1 of 2 \(cpu\) was killed by signal 9: load the model again$"
        ):
            summed(group, None)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_worker_that_fails_says_why(group: Workers) -> None:
    with pytest.raises(WorkerLostError, match=r"^worker 1 of 2 \(cpu\) failed: the weights are gone$"):
        summed(group, "fail")


def test_a_silent_worker_is_not_waited_for(group: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.3)
    with pytest.raises(WorkerLostError, match="did not answer within 0 s"):
        summed(group, "sleep")


def test_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Workers(partial(fail, "no room on the device"), CPUS)
    with pytest.raises(WorkerLostError, match=r"^worker 1 of 2 \(cpu\) failed: no room on the device$"):
        group.gather()
    group.close()
    monkeypatch.setattr(workers, "START_SECONDS", 0.0)
    with pytest.raises(WorkerLostError, match="did not start within 0 s"):
        Workers(listen, CPUS)
    assert not dist.is_initialized()


def test_devices() -> None:
    assert devices_for(torch.device("cpu"), 3) == [torch.device("cpu")] * 3
    with pytest.raises(RequestError, match="--tensor-parallel 1 must be at least 2"):
        devices_for(torch.device("cpu"), 1)
    with pytest.raises(RequestError, match=r"needs 99 CUDA devices, [0-9]+ found"):
        devices_for(torch.device("cuda", 0), 99)
    with pytest.raises(RequestError, match="not mps"):
        devices_for(torch.device("mps"), 2)
