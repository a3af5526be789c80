"""The flow model of a new checkpoint: codes to mel by conditional flow matching.

Trains TokenToMel on optimal-transport paths from noise to mel. Condition, prompt and speaker are at times
left out, so that one model serves guidance, cloning and plain decoding. An item is a prompt and a target, each cut
at the bounds of code groups and stretched by itself, as at inference; the prompt precedes the target in its clip or
comes from another clip of the speaker. All items of a batch have one length, so nothing is padded. What is kept is
the average of the last weights. Source: formats.md section 7.3; Lipman et al., "Flow Matching for Generative
Modeling", 2023. Shapes: B items, N codes, T mel frames, P groups of codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import CosyVoiceConfig
from cosyvoice.flow import FlowRequest, TokenToMel, num_frames
from stepaudio.checkpoints import FLOW_DIR
from stepaudio.export.decoder_files import FLOW_FILE, write_config, write_tensors
from stepaudio.train.averaging import averaged, follow
from stepaudio.train.crops import Crops
from stepaudio.train.data import Corpus
from stepaudio.train.features import Features
from stepaudio.train.graphed import GraphedStep
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.pictures import draw_mels
from tokenizer.codes import LAYOUT
from tokenizer.files import make_folder

SIZES = (4, 8, 16, 24, 32, 40, 48, 56, 64)  # groups of codes of an item; a clip is cut to the largest that it holds


@dataclass(frozen=True)
class FlowStageConfig:
    """The flow stage. Sizes and the share of unconditional items are the decoder's own."""

    loop: LoopConfig
    seconds_per_batch: float = 240.0
    longest: float = 8.0  # seconds; longer clips are cropped
    prior: float = 0.3  # weight of the distance between mu and mel
    prompted: float = 0.7  # share of the items with a prompt
    prompt_share: float = 0.5  # of an item at most is prompt
    other_clip: float = 0.5  # share of the prompts, and of the embeddings, that are of another clip of the speaker
    voice_noise: float = 0.2  # added to embeddings, relative to their length
    voice_dropped: float = 0.1  # share of the items without an embedding, which must follow their prompt
    test_clips: int = 48
    graphs: bool = True  # on a CUDA device, run each step as one captured graph


class FlowStage(Stage):
    """Codes and speaker embeddings -> mel."""

    def __init__(self, config: FlowStageConfig, decoder: CosyVoiceConfig, folder: Path, device: torch.device) -> None:
        self.config, self.decoder, self.device = config, decoder, device
        self.model = TokenToMel(decoder.flow)
        self.average = averaged(self.model)
        self.clips = Corpus.open(folder).clips
        kinds = [Features.open(folder, kind, device) for kind in ("codes", "mel", "embedding")]
        self.codes, self.mel, self.embeddings = (Crops(features) for features in kinds)
        lengths = [(kinds[0].length(index), kinds[1].length(index)) for index in range(len(self.clips))]
        self.groups = np.array([self.whole_groups(*pair) for pair in lengths])
        self.sizes = [size for size in SIZES if size * LAYOUT.group_seconds <= config.longest]
        self.train = np.array(
            [i for i, c in enumerate(self.clips) if c.split == "train" and self.groups[i] >= SIZES[0]]
        )
        self.same = Peers([self.clips[index].speaker for index in self.train])
        self.per_group = LAYOUT.group / decoder.flow.input_frame_rate * decoder.flow.sample_rate / decoder.flow.hop_size
        self.graphed = GraphedStep(device, config.graphs)

    def whole_groups(self, codes: int, frames: int) -> int:
        """Groups of codes of a clip that its mel covers."""
        groups = codes // LAYOUT.group
        while num_frames(groups * LAYOUT.group, self.decoder.flow) > frames:
            groups -= 1
        return groups

    def models(self) -> dict[str, nn.Module]:
        return {"flow": self.model, "average": self.average}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"flow": list(self.model.parameters())}

    def batches(self, start: int) -> Iterator[tuple[Tensor, int]]:
        """Items (see `items`) and their length in groups, every clip once in a while."""
        largest = np.array(self.sizes)[np.searchsorted(self.sizes, self.groups[self.train], side="right") - 1]
        done, epoch = 0, 0
        while True:
            rng = np.random.default_rng((self.config.loop.seed, epoch))
            batches: list[tuple[np.ndarray, int]] = []
            for size in np.unique(largest).tolist():
                members = np.flatnonzero(largest == size)
                count = max(1, round(self.config.seconds_per_batch / (size * LAYOUT.group_seconds)))
                order = rng.permutation(np.resize(members, -(-len(members) // count) * count))
                batches += [(part, size) for part in np.split(order, len(order) // count)]
            for at in rng.permutation(len(batches)):
                if done >= start:
                    part, size = batches[at]
                    yield self.items(part, size, np.random.default_rng((self.config.loop.seed, epoch, done))), size
                done += 1
            epoch += 1

    def items(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
        """[6, B]: clip, its first group, the prompt's clip, its first group, groups of prompt, clip of the embedding.

        `rows` are positions in `train`; prompt and target are `size` groups together.
        """
        config, count = self.config, len(rows)
        clip, groups = self.train[rows], self.groups[self.train[rows]]
        most = max(1, int(config.prompt_share * size))
        prompted = rng.random(count) < config.prompted
        prompt = np.where(prompted, rng.integers(1, most + 1, count), 0)
        other = self.train[self.same.draw(rows, rng)]
        elsewhere = (
            prompted & (rng.random(count) < config.other_clip) & (other != clip) & (self.groups[other] >= prompt)
        )
        source = np.where(elsewhere, other, clip)
        first = rng.integers(groups - size + 1 + np.where(elsewhere, prompt, 0))
        begin = np.where(elsewhere, rng.integers(np.maximum(1, self.groups[other] - prompt + 1)), first)
        target = np.where(elsewhere, first, first + prompt)
        voice = np.where(rng.random(count) < config.other_clip, self.train[self.same.draw(rows, rng)], source)
        return torch.from_numpy(np.stack([clip, target, source, begin, prompt, voice]))

    def take(self, items: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Codes [B, N], mel [B, 80, T], embeddings [B, 192], and how many codes and frames are prompt, [B] each."""
        clip, target, source, begin, prompt, voice = items
        codes, heard = prompt * LAYOUT.group, self.frame(prompt)
        at = torch.arange(size * LAYOUT.group, device=items.device)
        tokens = self._join(self.codes, (source, begin * LAYOUT.group), (clip, target * LAYOUT.group), codes, at)
        frames = num_frames(size * LAYOUT.group, self.decoder.flow)
        room = self.mel.length[clip] - frames + heard
        starts = (source, self.frame(begin)), (clip, self.frame(target).minimum(room))
        mel = self._join(self.mel, *starts, heard, torch.arange(frames, device=items.device))
        embedding = self.embeddings.take(voice, torch.zeros_like(voice), 1)[:, 0]
        return tokens[..., 0].long(), mel.transpose(1, 2).contiguous(), embedding, codes, heard

    def frame(self, groups: Tensor) -> Tensor:
        """The mel frame at which a group of codes begins."""
        return (groups * self.per_group).long()

    @staticmethod
    def _join(
        kind: Crops, prompt: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], bound: Tensor, at: Tensor
    ) -> Tensor:
        """Rows `at` of items [B, T, D]: before `bound` [B] from clips and starts of the prompt, then of the target."""
        first = at < bound[:, None]
        clips = torch.where(first, prompt[0][:, None], target[0][:, None])
        return kind.at(clips, at + torch.where(first, prompt[1][:, None], (target[1] - bound)[:, None]))

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        items, size = batch
        metrics = self.graphed(partial(self.learn, optimise, size), items, kind=size)
        follow(self.average, self.model, step)
        return dict(metrics)

    def learn(self, optimise: Optimise, size: int, items: Tensor) -> dict[str, Tensor]:
        """One step."""
        flow, prior = self.losses(self.model, *self.take(items, size))
        optimise("flow", flow + self.config.prior * prior)
        return {"flow": flow.detach(), "prior": prior.detach()}

    def losses(
        self, model: TokenToMel, codes: Tensor, mel: Tensor, embedding: Tensor, prompt_codes: Tensor, heard: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the velocity, and mean distance of mu from the mel."""
        mu = model.encode(codes, mel.shape[-1], prompt_codes=prompt_codes, prompt_frames=heard).float()
        prior = (mu - mel).abs().mean()
        kept = self.chance(len(mel), 1 - self.decoder.flow.training_cfg_rate)
        spks = self.voice(model, embedding) * kept[:, None]
        cond = mel * (torch.arange(mel.shape[-1], device=mel.device) < heard[:, None])[:, None] * kept[:, None, None]
        t = 1 - torch.cos(0.5 * math.pi * torch.rand(len(mel), device=mel.device))
        noise = torch.randn_like(mel)
        shrink = 1 - self.decoder.flow.sigma_min
        x = (1 - shrink * t[:, None, None]) * noise + t[:, None, None] * mel
        velocity = model.decoder.estimator(x, None, mu * kept[:, None, None], t, spks, cond)
        return F.mse_loss(velocity.float(), mel - shrink * noise), prior

    def voice(self, model: TokenToMel, embedding: Tensor) -> Tensor:
        """Conditions [B, 80] of embeddings, a little noise added; zeros in a share of the rows."""
        direction = F.normalize(embedding, dim=1)
        noise = torch.randn_like(direction) * (self.config.voice_noise / direction.shape[1] ** 0.5)
        return model.speaker(direction + noise) * self.chance(len(direction), 1 - self.config.voice_dropped)[:, None]

    def chance(self, count: int, share: float) -> Tensor:
        """1 in a share of the rows, 0 in the others, [count]."""
        return (torch.rand(count, device=self.device) < share).float()

    def finish(self, out: Path) -> None:
        folder = make_folder(out / FLOW_DIR)
        write_config(folder, self.decoder)
        write_tensors(folder / FLOW_FILE, {name: value.half() for name, value in self.average.state_dict().items()})
        (out / "scores.json").write_text(json.dumps(self.scores(out), indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def scores(self, out: Path) -> dict[str, float]:
        """Losses on held-out clips, and the distance of decoded mels (no prompt, 10 steps) from the true ones.

        Draws true mel, mu and decoded mel of three clips.
        """
        torch.manual_seed(self.config.loop.seed)
        rng = np.random.default_rng(self.config.loop.seed)
        held = [i for i, c in enumerate(self.clips) if c.split == "test" and self.groups[i] >= SIZES[0]]
        totals: list[tuple[float, float, float]] = []
        rows: list[dict[str, Tensor]] = []
        for index in rng.permutation(held)[: self.config.test_clips].tolist():
            size = int(min(self.groups[index], self.sizes[-1]))
            item = torch.tensor([index, 0, index, 0, 0, index], device=self.device)[:, None]
            codes, mel, embedding, *_ = self.take(item, size)
            flow, prior = self.losses(self.average, *self.take(item.expand(-1, 8), size))
            noise = torch.randn_like(mel[0])
            nothing = torch.zeros(0, mel.shape[1], device=mel.device)
            request = FlowRequest(codes[0], codes[0, :0], nothing, embedding[0], noise)
            decoded = self.average.generate([request])[0]
            totals.append((flow.item(), prior.item(), (decoded - mel[0]).abs().mean().item()))
            mu = self.average.encode(codes, mel.shape[-1])[0]
            rows.append({self.clips[index].id: mel[0], "mu": mu, "decoded": decoded})
        if not rows:
            return {}
        draw_mels(out / "samples.png", rows[:3])
        return dict(zip(("flow", "prior", "decoded"), np.mean(totals, axis=0).round(4).tolist()))


class Peers:
    """Who is the same speaker: draws others of one group for many items at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        _, self.group, counts = np.unique(np.array(names), return_inverse=True, return_counts=True)
        self.members = np.argsort(self.group, kind="stable")  # of the first name, then of the second ...
        self.counts, self.first = counts, np.cumsum(counts) - counts

    def draw(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One item of the same name for each; it may be the same one."""
        group = self.group[items]
        return self.members[self.first[group] + rng.integers(self.counts[group])]
