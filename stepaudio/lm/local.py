"""A language model run in this process: prefill in one call, then one token per step from a growing cache.

Knows nothing about text, prompts or sound. Prompts of different length share a batch by padding on the left; a
finished row leaves the batch. Works wherever the model's weights lie: one device, several, host memory or disk.
Legend: B rows still running, T tokens in the cache, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.load import load_model
from stepaudio.lm.modeling import Step1ForCausalLM
from stepaudio.lm.sampling import Sampler, check_params, check_room
from tokenizer.errors import RequestError


class LocalLM:
    """A `LanguageModel` over a `Step1ForCausalLM`."""

    def __init__(self, model: Step1ForCausalLM) -> None:
        self.model = model.eval()
        self.max_context = int(model.config.max_seq_len)
        self.vocab_size = int(model.config.vocab_size)
        self.device = _input_device(model)

    @classmethod
    def from_dir(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        **options: Any,
    ) -> LocalLM:
        """Loads a release folder, strictly; the arguments are those of `load_model`."""
        return cls(
            load_model(folder, device=device, dtype=dtype, device_map=device_map, max_memory=max_memory, **options)
        )

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Token]:
        """Yields tokens as they are drawn; the last has no id but the reason for the stop."""
        steps = self._run(*self._prepare([prompt], [params]))
        return _until_cancelled((token for _, token in steps), cancelled)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Runs the prompts as one batch; every row equals the prompt run alone."""
        ids: list[list[int]] = [[] for _ in prompts]
        stops: dict[int, StopReason] = {}
        for row, token in self._run(*self._prepare(prompts, params)):
            if token.id is not None:
                ids[row].append(token.id)
            elif token.stop is not None:
                stops[row] = token.stop
        return [Completion(tuple(ids[row]), stops[row]) for row in range(len(prompts))]

    def _prepare(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> tuple[Sequence[Sequence[int]], list[Sampler]]:
        """Checks everything before anything runs."""
        if len(prompts) != len(params):
            raise RequestError(f"{len(prompts)} prompts need as many sampling params, found {len(params)}")
        for prompt, wanted in zip(prompts, params):
            check_params(wanted, self.vocab_size)
            check_room(len(prompt), wanted, self.max_context)
            outside = next((index for index in prompt if not 0 <= index < self.vocab_size), None)
            if outside is not None:
                raise RequestError(f"prompt id {outside} must lie in 0..{self.vocab_size - 1}")
        samplers = [Sampler(wanted, prompt, self.vocab_size, self.device) for prompt, wanted in zip(prompts, params)]
        return prompts, samplers

    def _run(self, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler]) -> Iterator[tuple[int, Token]]:
        """Steps until every row has ended; yields (row, token) as they come."""
        rows = list(range(len(prompts)))
        ids, mask = pad_left(prompts, self.device)
        cache = DynamicCache(config=self.model.config)
        while rows:
            drawn = self._step(ids, mask, cache, [samplers[row] for row in rows])
            kept: list[int] = []
            for slot, (row, index) in enumerate(zip(rows, drawn.tolist())):
                emitted, stop = samplers[row].accept(index)
                if emitted:
                    yield row, Token(index)
                if stop is None:
                    kept.append(slot)
                else:
                    yield row, Token(None, stop)
            if len(kept) < len(rows):
                rows = [rows[slot] for slot in kept]
                drawn, mask = self._keep(kept, drawn, mask, cache)
            ids, mask = drawn[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    @torch.inference_mode()
    def _step(self, ids: Tensor, mask: Tensor, cache: DynamicCache, samplers: Sequence[Sampler]) -> Tensor:
        """New ids [B, S] and mask [B, T + S] -> drawn ids [B]; fetching them is the only wait of a step."""
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].to(self.device)
        return torch.stack([sampler.draw(row) for sampler, row in zip(samplers, logits)])

    @torch.inference_mode()
    def _keep(self, slots: list[int], drawn: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Drops every other row from the batch."""
        index = torch.tensor(slots, dtype=torch.int64)  # on the CPU: layers may lie on several devices
        if slots:
            cache.batch_select_indices(index)
        return drawn[index], mask[index]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and mask [B, T], 0 where a shorter prompt is filled up on the left."""
    longest = max(map(len, prompts), default=0)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return (
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(len(prompts), longest),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(len(prompts), longest),
    )


def _until_cancelled(tokens: Iterator[Token], cancelled: Callable[[], bool] | None) -> Iterator[Token]:
    for token in tokens:
        yield token
        if token.id is not None and cancelled is not None and cancelled():
            yield Token(None, StopReason.CANCELLED)
            return


def _input_device(model: Step1ForCausalLM) -> torch.device:
    """Where ids go in: the first weight that lies on a device; weights left on the disk run on the CPU."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
