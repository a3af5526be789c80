"""What the engines ask of a language model: token ids in, token ids out.

Knows nothing about text, prompts or sound. `LocalLM` and `RemoteLM` implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

IdRange = tuple[int, int]  # half open: first id, one past the last
ENGINES = ("auto", "fast", "eager")  # how a model in this process may be run, see `open.py`
AUTO = "auto"


class StopReason(str, Enum):
    """Why a generation ended; told to the caller, never hidden."""

    STOP = "stop"  # a stop id came
    LENGTH = "length"  # max_new_tokens or the context was reached
    LOOP = "loop"  # the loop guard saw the same run again and again
    CANCELLED = "cancelled"  # the caller asked to stop


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. Defaults are plain sampling; each engine states its own."""

    temperature: float = 0.7  # 0 takes the likeliest token
    top_k: int = 50  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    repetition_window: int = 0  # repetition-aware rule: look at so many last ids (release TTS: 10), 0 = off
    repetition_share: float = 0.1  # ... and forbid the last id if more than this share of them equals it
    allowed: tuple[IdRange, ...] = ()  # ids that may be drawn besides the stop ids; empty = all
    cycle: tuple[IdRange, ...] = ()  # position n of the output must lie in cycle[n % len]; stop only between cycles
    loop_guard: int = 0  # stop after so many immediate repeats of one run of up to 16 tokens, 0 = off
    stop_ids: tuple[int, ...] = (3,)  # <|EOT|>
    max_new_tokens: int = 2048
    seed: int | None = None  # None draws a fresh seed


class Token(NamedTuple):
    """One step of a stream: an id, or, last of all, `id=None` with the reason for the stop."""

    id: int | None
    stop: StopReason | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation: new ids without the stop id, and why it ended."""

    ids: tuple[int, ...]
    stop: StopReason


class LanguageModel(Protocol):
    """A language model over token ids.

    Same prompt, params and seed give the same ids, whatever else is in the batch.
    Both methods raise RequestError when prompt and max_new_tokens do not fit the context.
    """

    max_context: int  # prompt plus new tokens

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Token]:
        """Yields tokens as they are drawn; `cancelled` is asked between any two of them."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
    ) -> list[Completion]:
        """Runs several prompts as one batch, each with its own params and seed."""
        ...
