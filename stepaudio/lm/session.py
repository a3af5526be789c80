"""One decode loop for all requests of a model: they join, are drawn for together, and leave.

A request that joins is prefilled into a place of the static cache; every step then draws one token for each place in
use. The host looks at a step's ids while the device works on the next: a stop id or the full length ends a row on the
device itself, the loop guard ends it here. As rows leave, the last ones move into free places, so that the batch
shrinks. Knows nothing about text, threads or who reads the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from stepaudio.lm import fused
from stepaudio.lm.base import SamplingParams, Token
from stepaudio.lm.cache import StaticCache
from stepaudio.lm.device_sampling import DeviceSampler, mode_of, upload
from stepaudio.lm.fused import FusedStep1
from stepaudio.lm.graphs import Graphs
from stepaudio.lm.kernels.workspace import Workspace
from stepaudio.lm.memory import free_bytes
from stepaudio.lm.sampling import Ending
from tokenizer.errors import CheckpointError, RequestError, StepAudioError

MAX_ROWS = 64
_PIECE = 2048  # tokens of one prompt that are prefilled at once
_PREFILL_TOKENS = 8192  # ... and of several prompts together, padding included
_GRAPHED = 1024  # a prompt up to this long is prefilled by a graph: longer ones keep the device busy by themselves
_LEAST_PREFILL, _LEAST_CAPACITY, _LEAST_LENGTH = 32, 512, 1024
_GB = 10**9


@dataclass(eq=False)
class Row:
    """A request under way."""

    prompt: Sequence[int]
    params: SamplingParams
    ending: Ending
    slot: int = -1  # its place; -1 while it has none
    launched: int = 0  # draws the device was told to make
    tokens: deque[Token | StepAudioError] = field(default_factory=deque)  # what nobody has read yet

    @property
    def capacity(self) -> int:
        """Tokens its place must have room for."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def wanted(self) -> bool:
        """Whether another draw may be of use."""
        return self.slot >= 0 and self.launched < self.params.max_new_tokens


class _Pending(NamedTuple):
    """Ids that the device is drawing or copying."""

    rows: list[tuple[int, Row]]  # place in `ids`, row
    ids: Tensor
    copied: torch.cuda.Event | None


class Session:
    """The loop. Not safe to call from two threads at once; runs in its caller's inference mode and CUDA stream."""

    def __init__(
        self,
        model: FusedStep1,
        *,
        graphs: bool = True,
        max_rows: int = MAX_ROWS,
        ahead: int = 1,
        cache_limit: int | None = None,
    ) -> None:
        """`ahead`: steps the device may be ahead of the host; `cache_limit`: bytes instead of what is free."""
        self.model, self.max_rows, self.cache_limit = model, max_rows, cache_limit
        self.vocab_size = model.geometry.vocab_size
        self.on_cuda = model.device.type == "cuda"
        self.ahead = ahead if self.on_cuda else 0
        if self.on_cuda and model.workspace is None:
            model.workspace = Workspace(model.device)
        self.graphs = Graphs(model.device, graphs)
        self.sampler = DeviceSampler(max_rows, self.vocab_size, model.device)
        self.cache: StaticCache | None = None
        self.steps = 0  # decode steps launched so far
        self._places: list[Row | None] = [None] * max_rows
        self._pending: deque[_Pending] = deque()

    @property
    def live(self) -> list[Row]:
        return [row for row in self._places if row is not None]

    @property
    def free(self) -> int:
        """Places left."""
        return self._places.count(None)

    def join(self, rows: Sequence[Row]) -> None:
        """Gives the rows places and launches their prefill and first draw.

        Raises RequestError, before anything is changed, when there are more rows than places or the cache would
        take more memory than there is.
        """
        if len(rows) > self.free:
            raise RequestError(f"{len(rows)} more requests do not fit: {self.free} of {self.max_rows} places are free")
        slots = [slot for slot, row in enumerate(self._places) if row is None][: len(rows)]
        self._make_room(max([slots[-1] + 1, *(row.slot + 1 for row in self.live)]), max(row.capacity for row in rows))
        for slot, row in zip(slots, rows):
            row.slot, self._places[slot] = slot, row
        if self.sampler.join(slots, [row.prompt for row in rows], [row.params for row in rows]):
            self.graphs.clear()
        for count, group in self._groups(rows):
            self._prefill(group, count)

    def leave(self, row: Row) -> None:
        """Ends a row, whatever is still being drawn for it."""
        if row.slot < 0:
            return
        self.sampler.leave(row.slot)
        self._places[row.slot] = None
        row.slot = -1

    def step(self) -> None:
        """Draws the next token of every row and takes in what earlier steps drew."""
        if any(row.wanted for row in self.live):
            self._pack()
            self._decode()
            spare = self.ahead
        else:
            spare = 0
        while len(self._pending) > spare:
            self._collect(self._pending.popleft())

    def drain(self) -> None:
        """Ends every row with an error, after a step that broke."""
        self._pending.clear()
        for row in self.live:
            row.tokens.append(RequestError("an error in another request broke this one off: ask again"))
            self.leave(row)

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
        """Rows to be prefilled together, and the length to fill their prompts up to."""

        def bucket(row: Row) -> int:
            return self._bucket(len(row.prompt))

        for count, same in groupby(sorted(rows, key=bucket), key=bucket):
            group = list(same)
            size = max(1, _PREFILL_TOKENS // count)
            for first in range(0, len(group), size):
                part = group[first : first + size]
                yield (count if self.on_cuda else max(len(row.prompt) for row in part)), part

    def _bucket(self, tokens: int) -> int:
        """32, 48, 64, 96, 128 ...: at most a third of a bucket is padding."""
        size = _LEAST_PREFILL
        while size < tokens:
            size *= 2
        return size * 3 // 4 if size > _LEAST_PREFILL and tokens <= size * 3 // 4 else size

    def _prefill(self, rows: list[Row], count: int) -> None:
        """Prompts of up to `count` tokens, and the first draw after them."""
        device = self.model.device
        if count > _PIECE:
            for row in rows:
                self._prefill_pieces(row)
            return
        ids = upload([[*row.prompt, *[0] * (count - len(row.prompt))] for row in rows], device)
        slots = upload([row.slot for row in rows], device)
        lengths = upload([len(row.prompt) for row in rows], device, torch.int32)
        mode = mode_of([row.params for row in rows], self.vocab_size)

        def call(ids: Tensor, slots: Tensor, lengths: Tensor) -> None:
            assert self.cache is not None
            self.sampler.draw(fused.prefill(self.model, ids, self.cache, slots, lengths), slots, mode)
            self._forget_ended(slots)

        if len(rows) == 1 and count <= _GRAPHED:
            self.graphs.run(("prefill", count, mode), call, ids, slots, lengths, state=self._changing)
        else:
            call(ids, slots, lengths)
        self._fetch(rows)

    def _prefill_pieces(self, row: Row) -> None:
        """A long prompt, piece after piece."""
        assert self.cache is not None
        device = self.model.device
        slots = upload([row.slot], device)
        for start in range(0, len(row.prompt), _PIECE):
            piece = list(row.prompt[start : start + _PIECE])
            lengths = upload([len(piece)], device, torch.int32)
            logits = fused.prefill(self.model, upload([piece], device), self.cache, slots, lengths, start, row.slot)
        self.sampler.draw(logits, slots, mode_of([row.params], self.vocab_size))
        self._forget_ended(slots)
        self._fetch([row])

    def _decode(self) -> None:
        """One token for every place up to the last one in use."""
        assert self.cache is not None
        live = self.live
        count = 1 + max(row.slot for row in live)
        longest = max(len(row.prompt) + min(row.launched, row.params.max_new_tokens) for row in live)
        if self.on_cuda:
            count = min(_power(count), self.cache.rows)
            longest = min(_power(max(longest, _LEAST_LENGTH)), self.cache.capacity)
        mode = mode_of([row.params for row in live], self.vocab_size)
        places = slice(0, count)

        def call() -> None:
            assert self.cache is not None
            logits = fused.decode(self.model, self.sampler.state["ids"][places], self.cache, longest)
            self.sampler.draw(logits, places, mode)
            self._forget_ended(places)

        self.graphs.run(("decode", count, longest, mode), call, state=self._changing)
        self.steps += 1
        self._fetch(live)

    def _forget_ended(self, places: slice | Tensor) -> None:
        """An ended row has no keys: attention over its place costs next to nothing."""
        assert self.cache is not None
        self.cache.lengths[places] *= self.sampler.state["active"][places]

    @property
    def _changing(self) -> list[Tensor]:
        """What a captured call changes, but for the cache's contents, which a second run writes alike."""
        assert self.cache is not None
        return [*self.sampler.changing, self.cache.lengths]

    def _fetch(self, rows: Sequence[Row]) -> None:
        """Starts copying the drawn ids to the host."""
        for row in rows:
            row.launched += 1
        places = [(row.slot, row) for row in rows]
        if not self.on_cuda:
            self._pending.append(_Pending(places, self.sampler.out.clone(), None))
            return
        ids = torch.empty(self.max_rows, dtype=torch.int64, pin_memory=True)
        ids.copy_(self.sampler.out, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append(_Pending(places, ids, copied))

    def _collect(self, pending: _Pending) -> None:
        """Waits for drawn ids and hands them to their rows."""
        if pending.copied is not None:
            pending.copied.synchronize()
        ids = pending.ids.tolist()
        for slot, row in pending.rows:
            if row.slot < 0:
                continue  # it has left meanwhile
            try:
                emitted, stop = row.ending.accept(ids[slot])
            except CheckpointError as error:
                row.tokens.append(error)
                self.leave(row)
                continue
            if emitted:
                row.tokens.append(Token(ids[slot]))
            if stop is not None:
                row.tokens.append(Token(None, stop))
                self.leave(row)

    def _pack(self) -> None:
        """Moves the last rows into free places where that makes the batch smaller."""
        assert self.cache is not None
        live = self.live
        if self._batch(len(live)) == self._batch(max(row.slot for row in live) + 1):
            return
        holes = [slot for slot in range(len(live)) if self._places[slot] is None]
        for slot, row in zip(holes, [row for row in live if row.slot >= len(live)]):
            self.cache.move_row(row.slot, slot, len(row.prompt) + row.launched)
            self.sampler.move(row.slot, slot)
            self._places[row.slot], self._places[slot] = None, row
            row.slot = slot

    def _batch(self, rows: int) -> int:
        return _power(rows) if self.on_cuda else rows

    def _make_room(self, rows: int, capacity: int) -> None:
        """A cache of at least these sizes; what it holds already is kept."""
        limit = self.model.geometry.max_seq_len
        rows, capacity = min(_power(rows), self.max_rows), min(max(_power(capacity), _LEAST_CAPACITY), limit)
        cache = self.cache
        if cache is not None and rows <= cache.rows and capacity <= cache.capacity:
            return
        busy = cache is not None and bool(self.live)
        free = self.cache_limit if self.cache_limit is not None else free_bytes(self.model.device)
        if cache is not None:
            wide = (max(rows, cache.rows), max(capacity, cache.capacity))
            if self.cache_limit is None and not busy:
                free += cache.nbytes
            if busy or self._bytes(*wide) <= free // 2:  # so that sizes met in turn need no new cache each time
                rows, capacity = wide
        if self._bytes(rows, capacity) > free:
            raise RequestError(
                f"a cache of {rows} rows of {capacity} tokens takes {self._bytes(rows, capacity) / _GB:.2f} GB, "
                f"{free / _GB:.2f} GB are free: lower the batch size or max_new_tokens, or shorten the input"
            )
        self.graphs.clear()
        if not busy:
            self.cache = cache = None  # before the new one is taken
        self.cache = self.model.new_cache(rows, capacity)
        if cache is not None:
            self.cache.copy_from(cache)

    def _bytes(self, rows: int, capacity: int) -> int:
        model = self.model
        return StaticCache.bytes_for(
            len(model.layers), rows, model.groups, capacity, model.geometry.head_dim, model.dtype
        )


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()
