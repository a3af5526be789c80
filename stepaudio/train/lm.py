"""The language-model stage: one Step-1 model learns to listen, to think in its domain and to speak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.sequences import Example, Sequences


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
    workers: int = 8
    shard_bytes: int = 14_000_000


Batch = tuple[Tensor, Tensor]  # ids [B, S] and wanted [B, S]
_POOL = 3  # batches made at once, so that examples of like length share one


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
        while sum(len(one.ids) for one in pool) < _POOL * self.config.tokens_per_batch:
            one = self.sequences.draw(rng, str(rng.choice(tasks, p=shares / shares.sum())))
            if len(one.ids) <= self.config.longest:
                pool.append(one)
        pool.sort(key=lambda one: len(one.ids))
        cuts = self._cut(pool)
        return [collate(cuts[at]) for at in rng.permutation(len(cuts))[:_POOL]]

    def _cut(self, pool: list[Example]) -> list[list[Example]]:
        """A sorted pool in runs whose padded size fits the batch."""
        cuts: list[list[Example]] = [[]]
        for one in pool:
            if (len(cuts[-1]) + 1) * len(one.ids) > self.config.tokens_per_batch:
                cuts.append([])
            cuts[-1].append(one)
        return cuts


def collate(examples: list[Example], multiple: int = 64) -> Batch:
    """Right-padded ids and mask; the length is rounded up so that few shapes occur."""
    size = -(-max(len(one.ids) for one in examples) // multiple) * multiple
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
        self.geometry = Geometry(vocab_size=vocab.size, **config.model)
        torch.manual_seed(config.loop.seed)
        self.model = Step1ForCausalLM(
            Step1Config(**vars(self.geometry), bos_token_id=vocab.bos, eos_token_id=vocab.eot, alibi_dtype="bfloat16")
        )

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
        ids, wanted = (value.to(self.device, non_blocking=True) for value in batch)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        target = ids[:, 1:][wanted[:, 1:]]
        logits = self.model.lm_head(hidden[wanted[:, 1:]]).float()
        loss = F.cross_entropy(logits, target)
        optimise("all", loss)
        audio = target >= self.sequences.vocab.audio_base
        right = (logits.argmax(-1) == target).float()
        text = right[~audio]
        return {
            "loss": loss.detach(),
            "audio_right": right[audio].mean() if audio.any() else float("nan"),
            "text_right": text.mean() if len(text) else float("nan"),
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
