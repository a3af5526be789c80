"""One language model over several devices of a host: each rank holds a share of every layer (tensor parallelism).

Rank 0 is this process and has a `FastLM` like any other; the others follow. What rank 0's session is told (requests
join, a step, a request leaves) is sent to every rank before rank 0 does it, so all of them launch the same work in
the same order, whoever cancels or stops reading and when. The ranks meet on the devices alone: sums after `out` and
`down`, logits side by side, and rank 0's drawn ids, which count for all.

Oracle: the same weights on one rank. Knows nothing about text or sound.
"""

from __future__ import annotations

import atexit
import functools
import os
import secrets
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stepaudio.lm.base import SamplingParams
from stepaudio.lm.device_sampling import DeviceSampler, Mode, State
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused import FusedStep1
from stepaudio.lm.fused_load import announce, load_fused
from stepaudio.lm.fused_plan import DENSE
from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.memory import free_bytes
from stepaudio.lm.sampling import Ending
from stepaudio.lm.session import Row, Session
from stepaudio.lm.workers import Seat, Workers, devices_for
from tokenizer.errors import RequestError

_CACHE_SHARE = 0.5  # of what the fullest device has free: a cache that grows while rows run exists twice


class Build(Protocol):
    """Makes a rank's share of the model; a function of a module, or a partial of one, so that it can be sent."""

    def __call__(self, *, device: torch.device, rank: int, world: int) -> FusedStep1: ...


class ParallelLM(FastLM):
    """A `LanguageModel` over several devices, used as a `FastLM`; `close` ends its processes.

    Raises WorkerLostError, from whatever call comes next, once one of the processes is gone.
    """

    def __init__(self, build: Build, devices: Sequence[torch.device], **options: Any) -> None:
        """One rank on each device, rank 0 in this process; `options` are those of `FastLM`."""
        self.workers = Workers(functools.partial(_follow, build, options), devices)
        try:
            model = _built(build, self.workers.seat)
            limits = [_cache_limit(model), *self.workers.gather()]
            self.workers.watch()
            self.workers.send(min(limits))
            super().__init__(model, **{"cache_limit": min(limits), **options})
            with self._running():
                self.session.sampler = _SharedSampler.like(self.session.sampler)
        except BaseException:
            self.workers.close()
            raise
        self.session = _LeadingSession(self.session, self.workers)
        atexit.register(self.close)

    @classmethod
    def from_dir(
        cls,
        folder: str | os.PathLike[str],
        world: int,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        precision: str = DENSE,
        progress: bool = True,
        **options: Any,
    ) -> ParallelLM:
        """A release folder over `world` devices of the kind of `device`; each rank reads its own part of the files.

        Raises RequestError, before a process is started, for more devices than there are, a model that does not
        split into so many shares or does not fit; CheckpointError for files that are missing or damaged.
        """
        devices = devices_for(torch.device(device), world)
        announce(str(folder), Geometry.from_config(read_config(folder)), devices[0], dtype, precision, world)
        build = functools.partial(load_fused, folder, dtype=dtype, precision=precision, progress=progress)
        return cls(build, devices, **options)

    def close(self) -> None:
        """Ends the other processes; the model is of no use afterwards."""
        atexit.unregister(self.close)
        self.session.graphs.clear()  # they use the group
        self.workers.close()

    def __enter__(self) -> ParallelLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LeadingSession:
    """Rank 0's session: every call that launches work is told to the other ranks first."""

    def __init__(self, session: Session, workers: Workers) -> None:
        self._session, self._workers = session, workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def join(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.params = _seeded(row.params)
        self._workers.send(("join", [(list(row.prompt), row.params) for row in rows]))
        with self._workers.working():
            self._session.join(rows)

    def step(self) -> None:
        self._workers.send(("step",))
        with self._workers.working():
            self._session.step()

    def leave(self, row: Row) -> None:
        if row.slot >= 0 and self._workers.lost is None:
            self._workers.send(("leave", row.slot))
        self._session.leave(row)

    def drain(self) -> None:
        if self._workers.lost is None:
            self._workers.send(("drain",))
        self._session.drain()


class _SharedSampler(DeviceSampler):
    """Draws what rank 0 draws: on a GPU long sums are not always added in the same order."""

    @classmethod
    def like(cls, sampler: DeviceSampler) -> _SharedSampler:
        return cls(sampler.rows, sampler.vocab_size, sampler.device)

    def _drawn(self, logits: Tensor, now: State, mode: Mode) -> Tensor:
        ids = super()._drawn(logits, now, mode)
        dist.broadcast(ids, src=0)
        return ids


def _follow(build: Build, options: dict[str, Any], seat: Seat, connection: Connection) -> None:
    """What every other rank does: the same calls of a session of its own, until rank 0 hangs up (EOFError)."""
    model = _built(build, seat)
    connection.send(_cache_limit(model))
    limit = connection.recv()
    with _own_stream(seat.device):
        session = Session(model, **{"cache_limit": limit, **options})
        session.sampler = _SharedSampler.like(session.sampler)
        while True:
            name, *arguments = connection.recv()
            with suppress(RequestError):  # rank 0 raises it as well, and nothing has changed
                _CALLS[name](session, *arguments)


def _join(session: Session, requests: Sequence[tuple[list[int], SamplingParams]]) -> None:
    session.join([Row(prompt, params, Ending(params, session.vocab_size)) for prompt, params in requests])


def _leave(session: Session, slot: int) -> None:
    for row in session.live:
        if row.slot == slot:
            session.leave(row)


_CALLS = {"join": _join, "step": Session.step, "leave": _leave, "drain": Session.drain}


def _built(build: Build, seat: Seat) -> FusedStep1:
    """A rank's share, joined to the others."""
    model = build(device=seat.device, rank=seat.rank, world=seat.world)
    vocab = model.geometry.vocab_size

    def reduce(part: Tensor) -> Tensor:
        dist.all_reduce(part)  # a projection's result, which nobody else holds
        return part

    def gather(logits: Tensor) -> Tensor:
        rows, share = logits.shape
        every = logits.new_empty(seat.world * rows, share)
        dist.all_gather_into_tensor(every, logits.contiguous())
        return every.view(seat.world, rows, share).transpose(0, 1).reshape(rows, -1)[:, :vocab]

    model.reduce, model.gather = reduce, gather
    return model


def _cache_limit(model: FusedStep1) -> int:
    return int(_CACHE_SHARE * free_bytes(model.device))


def _own_stream(device: torch.device) -> Any:
    """As rank 0's `FastLM`: graphs are captured on a stream of their own."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device, priority=-1)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _seeded(params: SamplingParams) -> SamplingParams:
    """Every rank must draw the same numbers."""
    return replace(params, seed=secrets.randbits(63)) if params.seed is None else params
