"""The language-model stage: one Step-1 model learns to listen, to think in its domain and to speak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepaudio.export.lm_files import whole, write_lm_config, write_shards
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM
from stepaudio.train.graphed import GraphedStep
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.sequences import Example, Sequences

_IGNORED = -100  # a target that is not predicted


@dataclass(frozen=True)
class LmConfig:
    """Sizes and mix of the stage; `model` has the sizes of Geometry but for vocab_size."""

    loop: LoopConfig
    model: dict[str, Any] = field(default_factory=dict)
    tokens_per_batch: int = 20_000
    longest: int = 960
    mix: dict[str, float] = field(default_factory=lambda: {"asr": 0.34, "tts": 0.44, "spoken": 0.14, "text": 0.08})
    noise: dict[str, float] = field(default_factory=lambda: {"asr": 0.06, "tts": 0.03})
    recorded_share: float = 0.35  # of the recognition examples, recordings; a synthesiser spoke the others
    dropout: float = 0.1  # after attention and feed-forward, while training
    graphs: bool = True  # on a CUDA device, run steps as captured graphs
    workers: int = 8
    shard_bytes: int = 14_000_000


Batch = tuple[Tensor, Tensor]  # ids [B, S] and wanted [B, S]
_POOL = 6  # batches made at once, so that examples of like length share one
_GRID = 64  # lengths are rounded up to a multiple of it, so that few shapes occur


class Pools(Dataset):
    """Number -> that many batches of padded ids and mask; the same number always gives the same ones."""

    def __init__(self, sequences: Sequences, config: LmConfig) -> None:
        self.sequences, self.config = sequences, config

    def __len__(self) -> int:
        return -(-self.config.loop.steps // _POOL)

    def __getitem__(self, number: int) -> list[Batch]:
        rng = np.random.default_rng((self.config.loop.seed, number))
        pool: list[Example] = []
        tasks, shares = list(self.config.mix), np.asarray(list(self.config.mix.values()))
        missing = (_POOL + 1) * self.config.tokens_per_batch
        while missing > 0:
            one = self.sequences.draw(rng, str(rng.choice(tasks, p=shares / shares.sum())))
            if len(one.ids) <= self.config.longest:
                pool.append(one)
                missing -= len(one.ids)
        pool.sort(key=lambda one: -len(one.ids))
        cuts = list(self._cut(pool))
        return [collate(cuts[at % len(cuts)]) for at in rng.permutation(max(_POOL, len(cuts)))[:_POOL]]

    def _cut(self, pool: list[Example]) -> Iterator[list[Example]]:
        """A pool, longest first, in full batches: as many rows as the padded length always has."""
        first = 0
        while first < len(pool):
            rows = max(1, self.config.tokens_per_batch // _padded(pool[first]))
            if first == 0 or first + rows <= len(pool):
                yield pool[first : first + rows]
            first += rows


def _padded(example: Example) -> int:
    return -(-len(example.ids) // _GRID) * _GRID


def collate(examples: list[Example]) -> Batch:
    """Right-padded ids and mask."""
    size = max(map(_padded, examples))
    ids = np.zeros((len(examples), size), np.int64)
    wanted = np.zeros((len(examples), size), bool)
    for row, one in enumerate(examples):
        ids[row, : len(one.ids)] = one.ids
        wanted[row, : len(one.ids)] = one.wanted
    return torch.from_numpy(ids), torch.from_numpy(wanted)


class LmStage(Stage):
    """Next-token prediction on the wanted ids."""

    def __init__(
        self, config: LmConfig, sequences: Sequences, device: torch.device, export: Callable[[LmStage, Path], None]
    ) -> None:
        self.config, self.sequences, self.device, self.export = config, sequences, device, export
        vocab = sequences.vocab
        self._graphed = GraphedStep(device, config.graphs)
        self.geometry = Geometry(vocab_size=vocab.size, **config.model)
        torch.manual_seed(config.loop.seed)
        self.model = Step1ForCausalLM(
            Step1Config(**vars(self.geometry), bos_token_id=vocab.bos, eos_token_id=vocab.eot, alibi_dtype="bfloat16")
        )
        for layer in self.model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(self._drop)

    def models(self) -> dict[str, nn.Module]:
        return {"lm": self.model}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"all": list(self.model.parameters())}

    def batches(self, start: int) -> Iterator[Batch]:
        data = Pools(self.sequences, self.config)
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=range(start // _POOL, len(data) + 1),  # one more, so that the loop sees that the steps are done
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.config.workers else None,
        )
        for pool in loader:
            yield from pool

    def update(self, batch: Batch, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        return self._graphed(partial(self._learn, optimise), *batch)

    def _drop(self, part: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, self.config.dropout, part.training)

    def _learn(self, optimise: Optimise, ids: Tensor, wanted: Tensor) -> dict[str, float | Tensor]:
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        target = ids[:, 1:].masked_fill(~wanted[:, 1:], _IGNORED).flatten()
        logits = self.model.lm_head(hidden).flatten(0, 1).float()
        loss = F.cross_entropy(logits, target, ignore_index=_IGNORED)
        optimise("all", loss)
        audio, said = target >= self.sequences.vocab.audio_base, target != _IGNORED
        right = logits.argmax(-1) == target
        return {
            "loss": loss.detach(),
            "audio_right": (right & audio).sum() / audio.sum(),
            "text_right": (right & said & ~audio).sum() / (said & ~audio).sum(),
        }

    def finish(self, out: Path) -> None:
        self.export(self, out)

    def write(self, folder: Path) -> None:
        """config.json and the shards of a Step-1 folder, bfloat16."""
        vocab = self.sequences.vocab
        state = self.model.state_dict()
        write_lm_config(folder, self.geometry, bos=vocab.bos, eos=vocab.eot, pad=vocab.pad)
        blocks = whole({name: value.to(torch.bfloat16).cpu() for name, value in state.items()})
        write_shards(folder, self.geometry.weight_shapes(), blocks, shard_bytes=self.config.shard_bytes)
