"""Processes that do the work of an evaluation, each with an engine of its own that it loads when first asked.

Small models gain more from several processes with one thread than from one process with several threads, on a GPU
as well. Work is a function of this package that takes a list and returns a list of the same length.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from stepaudio.chat.engine import StepAudio
from stepaudio.device import resolve_dtype
from stepaudio.lm.base import AUTO

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Setup:
    """How a process loads its engine."""

    root: Path
    device: str = "cpu"
    dtype: str = "auto"
    precision: str = AUTO  # of the language models' weights
    threads: int = 1
    attempts: int = 3
    voices: Path | None = None  # folder of cached voice prompts
    batch_size: int = 16


_setup: Setup | None = None


def prepare(setup: Setup) -> None:
    """Makes this process ready to work."""
    global _setup
    _setup = setup
    engine.cache_clear()
    torch.set_num_threads(setup.threads)


@functools.cache
def engine() -> StepAudio:
    """The engine of this process, loaded once."""
    assert _setup is not None, "prepare comes first"
    device = torch.device(_setup.device)
    lm_options = {"precision": _setup.precision}
    options: dict[str, Any] = {
        "max_attempts": _setup.attempts,
        "batch_size": _setup.batch_size,
        "lm_options": lm_options,
    }
    return StepAudio.from_dir(
        _setup.root,
        device,
        resolve_dtype(_setup.dtype, device),
        batch_size=_setup.batch_size,
        lm_options=lm_options,
        tts_options={**options, "cache_dir": _setup.voices},
    )


class Crew:
    """`workers` processes; with 0 this process does the work itself."""

    def __init__(self, setup: Setup, workers: int) -> None:
        self.setup, self.workers = setup, workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(setup,))
        else:
            prepare(setup)

    def map(self, work: Callable[[list[T]], list[R]], items: Sequence[T], what: str, batch: int = 1) -> list[R]:
        """Results in the order of the items; `batch` items at a time go to one process, fewer where all have work."""
        batch = max(1, min(batch, -(-len(items) // max(1, self.workers))))
        chunks = [list(items[start : start + batch]) for start in range(0, len(items), batch)]
        done = map(work, chunks) if self._pool is None else self._pool.map(work, chunks)
        results: list[R] = []
        with tqdm(total=len(items), desc=what, leave=False) as bar:
            for chunk in done:
                results += chunk
                bar.update(len(chunk))
        return results

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
