"""Processes on this host that work in step with this one: started, watched, told what to do, and ended.

Rank 0 is the calling process; every other rank is a process with a device of its own. All of them share one
torch.distributed group (NCCL on CUDA, gloo on the CPU). A worker that dies, fails or stops answering ends the group:
what waits for it is released, and every later call says why in one line. Knows nothing about models.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tokenizer.device import use_full_float32
from tokenizer.errors import RequestError, StepAudioError, describe

START_SECONDS = 180.0  # for a worker to start and to meet the others
ANSWER_SECONDS = 600.0  # for one command: long prompts of a large model, kernels compiled on first use
_HOST = "127.0.0.1"
_Target = Callable[["Seat", Connection], None]


class WorkerLostError(StepAudioError):
    """A process of the group is gone; the model must be loaded again."""


@dataclass(frozen=True)
class Seat:
    """A process's place in the group."""

    rank: int
    world: int
    device: torch.device
    port: int  # where the ranks meet
    threads: int  # for work on the CPU

    def __str__(self) -> str:
        return f"worker {self.rank} of {self.world} ({self.device})"


@dataclass(frozen=True)
class Failure:
    """A worker's last message."""

    reason: str


def devices_for(device: torch.device, world: int) -> list[torch.device]:
    """The devices of `world` ranks: the first CUDA devices, or the CPU shared by all. RequestError for too few."""
    if world < 2:
        raise RequestError(f"--tensor-parallel {world} must be at least 2 to split the model")
    if device.type == "cpu":
        return [device] * world
    if device.type != "cuda":
        raise RequestError(f"--tensor-parallel needs CUDA devices or the CPU, not {device.type}")
    if torch.cuda.device_count() < world:
        raise RequestError(f"--tensor-parallel {world} needs {world} CUDA devices, {torch.cuda.device_count()} found")
    return [torch.device("cuda", index) for index in range(world)]


class Workers:
    """The other ranks, seen from rank 0. `target(seat, connection)` is what each of them runs until EOFError."""

    def __init__(self, target: _Target, devices: Sequence[torch.device]) -> None:
        """Returns when all have met. RequestError where a group exists already, WorkerLostError for a failed start.

        `target` is pickled, so it must be a function of a module, or a partial of one.
        """
        if dist.is_initialized():
            raise RequestError("torch.distributed is in use in this process: run --tensor-parallel in one of its own")
        self.lost: str | None = None
        self._closing = False
        self._deadline: float | None = None
        self._lock = threading.Lock()
        store = dist.TCPStore(_HOST, 0, len(devices), is_master=True, wait_for_workers=False)
        threads = max(1, torch.get_num_threads() // len(devices))
        self.seats = [Seat(rank, len(devices), device, store.port, threads) for rank, device in enumerate(devices)]
        self._processes, self._connections = [], []
        context = multiprocessing.get_context("spawn")
        for seat in self.seats[1:]:
            mine, theirs = context.Pipe()
            process = context.Process(target=_run, args=(target, seat, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(mine)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        atexit.register(self.close)
        try:
            self.gather(START_SECONDS)
            _meet(self.seats[0], store)
        except BaseException:
            self.close()
            raise

    @property
    def seat(self) -> Seat:
        """That of this process."""
        return self.seats[0]

    def gather(self, seconds: float | None = None) -> list[Any]:
        """One message from each worker, by rank; only before `watch`. WorkerLostError if one ends or is late."""
        messages: dict[int, Any] = {}
        deadline = None if seconds is None else time.monotonic() + seconds
        while len(messages) < len(self._processes):
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            waiting = [index for index in range(len(self._processes)) if index not in messages]
            ready = wait([self._connections[index] for index in waiting], rest)
            if not ready:
                self._fail(f"{self.seats[waiting[0] + 1]} did not start within {seconds:.0f} s")
            for index in waiting:
                if self._connections[index] in ready:
                    messages[index] = self._received(index)
        return [messages[index] for index in sorted(messages)]

    def watch(self) -> None:
        """From now on workers only listen, and a thread sees to it that none of them is missed."""
        self._watcher.start()

    def send(self, message: Any) -> None:
        """Tells every worker; WorkerLostError if one is gone."""
        self.check()
        try:
            for connection in self._connections:
                connection.send(message)
        except OSError:
            self._explain(None)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what rank 0 does with the others: bounded in time, and a lost worker is named as the reason."""
        self._deadline = time.monotonic() + ANSWER_SECONDS
        try:
            yield
        except RequestError:
            raise
        except Exception as error:
            self._explain(error)
        finally:
            self._deadline = None
        self.check()

    def check(self) -> None:
        """Raises WorkerLostError once a worker is lost."""
        if self.lost is not None:
            raise WorkerLostError(self.lost)

    def close(self) -> None:
        """Ends all processes and the group; twice is fine. Graphs that use the group must be gone by then."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        atexit.unregister(self.close)
        for connection in self._connections:
            connection.close()  # a worker that listens ends by itself
        for process in self._processes:
            process.join(0.0 if self.lost else 5.0)
            if process.is_alive():
                process.kill()
                process.join()
        failed, self.lost = self.lost is not None, self.lost or "the model was closed: load it again"
        if dist.is_initialized() and self.seat.device.type != "cuda":
            dist.destroy_process_group()
        elif dist.is_initialized() and not failed:
            dist.distributed_c10d._abort_process_group()  # there is nobody left to say goodbye to

    def _explain(self, error: Exception | None) -> NoReturn:
        """Waits for the watcher to find a lost worker; if it finds none, the fault is rank 0's own."""
        self._watcher.join(5.0)
        if self.lost is None:
            reason = (describe(error) or f"{type(error).__name__}: {error}") if error else "a worker does not listen"
            self._lose(f"the ranks are out of step after an error ({reason}): load the model again")
            if error is not None:
                raise error
        raise WorkerLostError(self.lost) from error

    def _received(self, index: int) -> Any:
        """The next message of a worker; WorkerLostError if it is its last."""
        try:
            message = self._connections[index].recv()
        except (EOFError, OSError):
            self._fail(self._obituary(index))
        if isinstance(message, Failure):
            self._fail(f"{self.seats[index + 1]} failed: {message.reason}")
        return message

    def _obituary(self, index: int) -> str:
        """Why a worker ended, in one line."""
        self._processes[index].join(5.0)
        connection, code = self._connections[index], self._processes[index].exitcode
        try:
            while connection.poll():
                message = connection.recv()
                if isinstance(message, Failure):
                    return f"{self.seats[index + 1]} failed: {message.reason}"
        except (EOFError, OSError):
            pass
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"{self.seats[index + 1]} {how}: load the model again"

    def _watch(self) -> None:
        """Until a worker ends or a command takes too long."""
        sentinels = [process.sentinel for process in self._processes]
        while not self._closing:
            ended = wait(sentinels, timeout=0.5)
            if self._closing:
                return
            if ended:
                self._lose(self._obituary(sentinels.index(ended[0])))
                return
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._lose(f"the workers did not answer within {ANSWER_SECONDS:.0f} s: load the model again")
                return

    def _fail(self, reason: str) -> NoReturn:
        self._lose(reason)
        raise WorkerLostError(reason)

    def _lose(self, reason: str) -> None:
        """Ends what is left of the group, so that nobody waits for it any more."""
        self.lost = self.lost or reason
        for process in self._processes:
            process.kill()
        if self.seat.device.type == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()  # kernels that wait for another rank return


def _meet(seat: Seat, store: dist.Store) -> None:
    """Joins the group; NCCL connects at once, so that graphs can be captured."""
    cuda = seat.device.type == "cuda"
    if cuda:
        # Captured collectives are not seen by its watchdog, and what it does see it would answer with an abort.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # graphs come and go with their memory
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=seat.rank,
        world_size=seat.world,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        device_id=seat.device if cuda else None,
    )


def _run(target: _Target, seat: Seat, connection: Connection) -> NoReturn:
    """The life of a worker's process. It ends without clean-up: communicators with live graphs would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 0
    try:
        torch.set_num_threads(seat.threads)
        use_full_float32()
        if seat.device.type == "cuda":
            torch.cuda.set_device(seat.device)
        connection.send("started")
        _meet(seat, dist.TCPStore(_HOST, seat.port, seat.world, is_master=False))
        target(seat, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # rank 0 is done
    except BaseException as error:
        code = 1
        _report(connection, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(connection: Connection, error: BaseException) -> None:
    known = describe(error)
    if known is None:
        traceback.print_exception(error)
    with suppress(OSError):
        connection.send(Failure(known or f"{type(error).__name__}: {error}".splitlines()[0]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
