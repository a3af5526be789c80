"""How the flow runs: as written, or as one CUDA graph per shape, with fused kernels where they fit.

`plain` is `TokenToMel` itself, at the exact lengths, and the oracle of the others. `graph` captures the same modules
at the padded shape of a bucket; `fused` captures the encoder and `fused.FusedSolver`. Padding changes no result
beyond the rounding of the dtype. Legend: B batch, N codes, T mel frames, M mel bands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cosyvoice.buckets import flow_bucket
from cosyvoice.flow import FlowBatch, FlowRequest, TokenToMel, collate
from tokenizer.errors import RequestError
from tokenizer.graphs import GraphPool

ENGINES = ("auto", "fused", "graph", "plain")
_GRAPHS = 40  # shapes kept; each graph holds some thousand launches
_log = logging.getLogger(__name__)


def choose(engine: str, device: torch.device, why_not_fused: str | None) -> str:
    """The engine that `auto` means here. Raises RequestError for an unknown one and for one that cannot run."""
    if engine not in ENGINES:
        raise RequestError(f"decoder engine {engine!r} is unknown: use {', '.join(ENGINES)}")
    if engine == "plain" or (engine == "auto" and device.type != "cuda"):
        return "plain"
    if device.type != "cuda":
        raise RequestError(f'decoder engine "{engine}" needs a CUDA device, not {device}: use "auto" or "plain"')
    if engine == "fused" and why_not_fused:
        raise RequestError(f'decoder engine "fused" cannot run: {why_not_fused}: use "auto", "graph" or "plain"')
    if engine == "auto" and why_not_fused:
        _log.info("flow: no fused kernels (%s), the plain ones run as a graph", why_not_fused)
    return "graph" if engine == "graph" or why_not_fused else "fused"


class FlowEngine:
    """Serves `TokenToMel.generate` on a CUDA device; attach it with `model.engine = FlowEngine(model)`."""

    def __init__(self, model: TokenToMel, engine: str = "auto") -> None:
        weight = model.encoder_proj.weight
        self.model, self.device, self.dtype = model, weight.device, weight.dtype
        self.engine = choose(engine, self.device, _why_not_fused(model))
        self.pool = GraphPool(self.device, _GRAPHS) if self.device.type == "cuda" else None
        self._solver = None
        if self.engine == "fused":
            from cosyvoice.fused import FusedSolver

            self._solver = FusedSolver(model.decoder)

    @torch.inference_mode()
    def generate(self, requests: Sequence[FlowRequest], num_steps: int = 10) -> list[Tensor]:
        """As `TokenToMel.generate`. A batch too large for a graph runs the same function without one."""
        model = self.model
        if self.engine == "plain":
            mel = model(collate(requests, model.config, self.device, self.dtype), num_steps)
        else:
            mel = self._padded(requests, num_steps)
        return [row[:, len(r.prompt_mel) : r.noise.shape[-1]] for row, r in zip(mel, requests)]

    def _padded(self, requests: Sequence[FlowRequest], num_steps: int) -> Tensor:
        frames = max(r.noise.shape[-1] for r in requests)
        codes = max(len(r.prompt_codes) + len(r.codes) for r in requests)
        sizes = flow_bucket(len(requests), frames, codes)
        exact = (len(requests), frames + frames % 2, codes)
        batch = collate(requests, self.model.config, self.device, self.dtype, sizes or exact)
        inputs = _tensors(batch)
        self._prepare(num_steps)
        solve = partial(self.solve, num_steps=num_steps)
        if sizes is None or self.pool is None:
            return solve(*inputs)
        return self.pool.run((*sizes, num_steps), solve, *inputs)

    def _prepare(self, num_steps: int) -> None:
        """What is copied from the host must lie on the device before a capture begins."""
        if self._solver is not None:
            self._solver.times(num_steps)
        else:
            self.model.decoder.grid(num_steps, self.model.encoder_proj.weight)

    def solve(self, *inputs: Tensor, num_steps: int) -> Tensor:
        """Padded tensors (the fields of `FlowBatch` in order) -> mel [B, M, T]; fixed shapes, no wait for the host."""
        batch = FlowBatch(*inputs)
        if self._solver is None:
            return self.model(batch, num_steps)
        model, frames = self.model, batch.noise.shape[-1]
        mu = model.encode(
            batch.codes, frames, batch.code_lengths, batch.frame_lengths, batch.prompt_codes, batch.prompt_frames
        )
        speaker = model.speaker(batch.embedding)
        return self._solver(batch.noise, batch.frame_lengths, mu, speaker, batch.prompt_mel, num_steps)


def _tensors(batch: FlowBatch) -> tuple[Tensor, ...]:
    tensors = tuple(vars(batch).values())
    assert all(value is not None for value in tensors), "a padded batch has lengths"
    return tensors


def _why_not_fused(model: TokenToMel) -> str | None:
    from cosyvoice.fused import unsupported

    weight = model.encoder_proj.weight
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"they are for bfloat16 and float16, not {weight.dtype}"
    return unsupported(model.config.estimator, weight.device)
