"""A whole training step replayed as one CUDA graph: small models spend their time on launches, not on arithmetic.

The step (forward, backward and optimiser) has fixed shapes and never waits for the device: no `.item()`, no mask as
an index, no tensor made from a Python list. What changes from step to step comes in as tensors; everything else that
it depends on is its `kind`. Elsewhere than on a CUDA device, or with `enabled=False`, the same function simply runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.errors import RequestError

EAGER_STEPS = 3  # of each kind before it is captured: kernels are chosen and compiled, optimisers get their state
Step = Callable[..., dict[str, Tensor]]  # device tensors -> what to log, scalars on the device


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    names: list[str]
    values: Tensor  # [names]


class GraphedStep:
    """Runs `step(*inputs)` exactly once per call; from the fourth call of a kind on as a graph.

    A kind is `kind` and the shapes of the inputs, which may lie on the host. After the capture the function that is
    handed in is not looked at any more: it must always do the same to the same models and optimisers.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.device = device
        self.enabled = enabled and device.type == "cuda"
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}
        if self.enabled:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, *inputs: Tensor, kind: Hashable = None) -> dict[str, Tensor]:
        """What the step returns, in tensors that later calls leave alone."""
        if not self.enabled:
            return step(*(value.to(self.device) for value in inputs))
        key = (kind, *((tuple(value.shape), value.dtype) for value in inputs))
        if key not in self._captured:
            self._seen[key] += 1
            with _kernels_tried(), _fresh_casts():
                if self._seen[key] <= EAGER_STEPS:
                    return self._eager(step, inputs)
                self._captured[key] = self._capture(step, inputs, kind)
        captured = self._captured[key]
        for kept, given in zip(captured.inputs, inputs):
            kept.copy_(given, non_blocking=True)
        captured.graph.replay()
        return dict(zip(captured.names, captured.values.clone().unbind()))

    def __len__(self) -> int:
        """How many kinds are captured."""
        return len(self._captured)

    def _eager(self, step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step on the stream of the captures, so that what libraries keep per stream is there."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            result = step(*(value.to(self.device) for value in inputs))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return result

    def _capture(self, step: Step, inputs: tuple[Tensor, ...], kind: Hashable) -> _Captured:
        """All captures share their memory: each writes what it reads, and only `values` outlives a replay."""
        kept = [value.to(self.device, copy=True) for value in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logged = step(*kept)
                values = torch.stack([value.detach().float() for value in logged.values()])
        except RuntimeError as error:
            raise RequestError(
                f"the training step {kind!r} cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): "
                "set `graphs: false` in the stage's settings"
            ) from error
        return _Captured(graph, kept, list(logged), values)


@contextmanager
def _kernels_tried() -> Iterator[None]:
    """Lets cuDNN time its kernels for each shape and keep the fastest: worth it where a shape comes again and again."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _fresh_casts() -> torch.autocast:
    """The arithmetic that is set, without kept casts: weights change within a step, and a graph casts them itself."""
    return torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False)
