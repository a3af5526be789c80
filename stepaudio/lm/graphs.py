"""CUDA graphs in one place: warm-up, capture, a check of what goes in, and a bound on how many there are.

Knows nothing about models. A call that may be captured takes tensors of fixed shapes, leaves its results in tensors
that stay, and never waits for the device. Without a CUDA device the same call simply runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

LIMIT = 48  # graphs alive at once; the one not used for longest goes
_WARMUPS = 2


class Graphs:
    """Captured calls by key, all in one memory pool."""

    def __init__(self, device: torch.device, enabled: bool, limit: int = LIMIT) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.device, self.limit = device, limit
        self.captured = 0  # so many captures so far
        self.nbytes = 0  # device memory that the graphs alive took when they were captured
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drops every graph, once they have run: tensors they know have moved."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
        self._graphs.clear()
        self._pool, self.nbytes = None, 0

    def run(self, key: Hashable, call: Callable[..., None], *inputs: Tensor, state: Sequence[Tensor] = ()) -> None:
        """`call(*inputs)`, from a graph where graphs are enabled.

        Equal keys mean the same call with inputs of the same shapes. `state` are the tensors it changes, which a
        capture must leave as they were.
        """
        if not self.enabled:
            call(*inputs)
            return
        if key not in self._graphs:
            while len(self._graphs) >= self.limit:
                self.nbytes -= self._graphs.popitem(last=False)[1].nbytes
            self._graphs[key] = self._capture(call, inputs, state)
        self._graphs.move_to_end(key)
        self._graphs[key].replay(key, inputs)

    def _capture(self, call: Callable[..., None], inputs: Sequence[Tensor], state: Sequence[Tensor]) -> _Captured:
        kept, copies = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in state]
        for _ in range(_WARMUPS):  # compiles kernels and takes the libraries' workspaces
            call(*kept)
            for tensor, copy in zip(state, copies):
                tensor.copy_(copy)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            call(*kept)
        self.captured += 1
        taken = max(0, free - torch.cuda.mem_get_info(self.device)[0])
        self.nbytes += taken
        return _Captured(graph, kept, taken)


class _Captured:
    """A graph and the tensors it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], nbytes: int) -> None:
        self.graph, self.inputs, self.nbytes = graph, inputs, nbytes

    def replay(self, key: Hashable, inputs: Sequence[Tensor]) -> None:
        for kept, given in zip(self.inputs, inputs, strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype:
                raise RuntimeError(
                    f"graph {key} was captured for {kept.dtype} {tuple(kept.shape)}, not {given.dtype} "
                    f"{tuple(given.shape)}: `--engine eager` runs without graphs"
                )
            kept.copy_(given, non_blocking=True)
        self.graph.replay()
