"""CUDA graphs in one place: warm-up, capture, input copies, shape checks, a bounded pool of captured shapes.

Knows nothing of models. A graph replays the same kernels on the same addresses: inputs are copied into buffers that
live as long as the graph, shapes never change, and nothing inside may wait for the host.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import RequestError

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Graph:
    """One captured call. Not thread-safe: `GraphPool` guards the ones it holds.

    `function` takes `inputs` and returns a tensor or a tuple of them; all lie on one CUDA device. It is called
    `warmup` times on a side stream (kernels compile and libraries choose algorithms there), then captured.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        *,
        pool: Any = None,
        warmup: int = 2,
        off: str = 'engine="plain"',
    ) -> None:
        self.off = off
        self.inputs = tuple(value.clone() for value in inputs)
        device = self.inputs[0].device
        before = torch.cuda.memory_reserved(device)
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    function(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            torch.cuda.synchronize(device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
        self.bytes = max(0, torch.cuda.memory_reserved(device) - before)  # what capture added to this process

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Copies the inputs in and replays; the outputs are overwritten by the next call.

        Raises RequestError for another number, shape or dtype of inputs.
        """
        check_shapes(self.inputs, inputs, self.off)
        for place, value in zip(self.inputs, inputs):
            if place is not value:
                place.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


class GraphPool:
    """The `limit` most recently used graphs of one device, in one shared memory pool.

    Calls may come from several threads and streams: they take turns, on the host and on the device.
    """

    def __init__(self, device: torch.device, limit: int = 32, *, off: str = 'engine="plain"') -> None:
        assert limit >= 1, limit
        self.device, self.limit, self.off = device, limit, off
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._handle: Any = None
        self._last: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Device memory that the captures of the graphs held now have added, shared blocks counted once."""
        return sum(graph.bytes for graph in self._graphs.values())

    @torch.inference_mode()
    def run(self, key: Hashable, function: Function, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What `function(*inputs)` returns, as new tensors, by the graph of this key; captures it when it is new."""
        with self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None:
                stream.wait_event(self._last)
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(key, function, inputs)
            self._graphs.move_to_end(key)
            outputs = graph(*inputs)
            copies = tuple(out.clone() for out in outputs) if isinstance(outputs, tuple) else outputs.clone()
            self._last = stream.record_event()
        return copies

    def clear(self) -> None:
        """Drops every graph and gives their memory back."""
        with self._lock:
            torch.cuda.synchronize(self.device)
            self._graphs.clear()
            self._handle = None

    def _capture(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Graph:
        while len(self._graphs) >= self.limit:
            torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        graph = Graph(function, inputs, pool=self._handle, off=self.off)
        self._graphs[key] = graph
        return graph


def check_engine(engine: str) -> None:
    """Raises RequestError unless a tokenizer can run so."""
    if engine not in ("auto", "plain"):
        raise RequestError(f"tokenizer engine {engine!r} is unknown: use auto or plain")


def check_shapes(expected: Sequence[Tensor], given: Sequence[Tensor], off: str) -> None:
    """Raises RequestError, naming the switch that runs without graphs, unless shapes and dtypes are the same."""
    wanted = [(tuple(value.shape), value.dtype) for value in expected]
    found = [(tuple(value.shape), value.dtype) for value in given]
    if wanted != found:
        raise RequestError(f"a graph captured for {wanted} was given {found}: {off} runs without graphs")
