"""A language model at the speed of its memory: fused weights, a static cache, captured steps, sampling on the device.

Streams and batches that run at the same time share one decode loop (`session.py`), so they may come from several
threads. Works on a CUDA device, as graphs, and on the CPU, as the same calls. Knows nothing about text or sound.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.fused import FusedStep1
from stepaudio.lm.sampling import Ending, check_params, check_room
from stepaudio.lm.session import Row, Session
from tokenizer.errors import RequestError, StepAudioError


class FastLM:
    """A `LanguageModel` over a `FusedStep1`."""

    def __init__(self, model: FusedStep1, **options: Any) -> None:
        """`options` are those of `Session`: graphs, max_rows, ahead, cache_limit."""
        if model.alibi_dtype != torch.float32:
            raise RequestError(f"the fast engine has no {model.alibi_dtype} position bias: use --engine eager")
        self.model = model
        self.max_context = model.geometry.max_seq_len
        self.vocab_size = model.geometry.vocab_size
        self.device = model.device
        self._lock = threading.RLock()
        # A stream of its own: steps run beside what other threads do with the device, and before it.
        self._stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._running():
            self.session = Session(model, **options)

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[Token]:
        """Yields tokens as they are drawn; the last has no id but the reason for the stop.

        The device is at most one token ahead of what is read, which is what cancelling may cost.
        """
        [row] = self._rows([prompt], [params])
        return self._tokens(row, cancelled)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Runs the prompts together, as many at a time as there are places; the others join as rows leave."""
        rows = self._rows(prompts, params)
        waiting = deque(rows)
        try:
            while waiting or any(row.slot >= 0 for row in rows):
                with self._running():
                    if waiting and self.session.free:
                        self.session.join([waiting.popleft() for _ in range(min(len(waiting), self.session.free))])
                    self.session.step()
            return [_completion(row) for row in rows]
        finally:
            self._leave(rows)

    def memory(self) -> dict[str, int]:
        """Bytes taken by the cache, the sampler's state and the graphs, and how many graphs there are."""
        session = self.session
        return {
            "cache": session.cache.nbytes if session.cache is not None else 0,
            "sampler": session.sampler.nbytes,
            "graphs": session.graphs.nbytes,
            "graph_count": len(session.graphs),
        }

    def _rows(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Row]:
        """Checks everything before anything runs."""
        check_requests(prompts, params, self.vocab_size, self.max_context)
        return [Row(prompt, wanted, Ending(wanted, self.vocab_size)) for prompt, wanted in zip(prompts, params)]

    def _tokens(self, row: Row, cancelled: Callable[[], bool] | None) -> Iterator[Token]:
        try:
            with self._running():
                self.session.join([row])
            while True:
                token = self._next(row)
                yield token
                if token.id is None:
                    return
                if cancelled is not None and cancelled():
                    yield Token(None, StopReason.CANCELLED)
                    return
        finally:
            self._leave([row])

    def _next(self, row: Row) -> Token:
        """The next token of a row; other rows' tokens that come meanwhile wait in theirs."""
        if not row.tokens:
            with self._running():
                while not row.tokens:
                    self.session.step()
        return _checked(row.tokens.popleft())

    def _leave(self, rows: Sequence[Row]) -> None:
        with self._lock, self._on_stream(), torch.inference_mode():
            for row in rows:
                self.session.leave(row)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The loop for one thread, on its own CUDA stream; an error inside leaves no half-done step behind."""
        with self._lock, self._on_stream(), torch.inference_mode():
            try:
                yield
            except RequestError:
                raise
            except BaseException:
                if hasattr(self, "session"):
                    self.session.drain()
                raise

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


def check_requests(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], vocab_size: int, max_context: int
) -> None:
    """Raises RequestError for params, lengths or ids that the model cannot serve."""
    if len(prompts) != len(params):
        raise RequestError(f"{len(prompts)} prompts need as many sampling params, found {len(params)}")
    for prompt, wanted in zip(prompts, params):
        check_params(wanted, vocab_size)
        check_room(len(prompt), wanted, max_context)
        outside = next((index for index in prompt if not 0 <= index < vocab_size), None)
        if outside is not None:
            raise RequestError(f"prompt id {outside} must lie in 0..{vocab_size - 1}")


def _checked(token: Token | StepAudioError) -> Token:
    if isinstance(token, StepAudioError):
        raise token
    return token


def _completion(row: Row) -> Completion:
    tokens = [_checked(token) for token in row.tokens]
    assert tokens[-1].stop is not None, "a row ends with its reason"
    return Completion(tuple(token.id for token in tokens[:-1] if token.id is not None), tokens[-1].stop)
