"""The flow model of a new checkpoint: codes to mel by conditional flow matching.

Trains TokenToMel on optimal-transport paths from noise to mel. Condition, prompt and speaker are at times
left out, so that one model serves guidance, cloning and plain decoding. The clips of a batch are cropped to
one length at the bounds of code groups, so nothing is padded. Source: formats.md section 7.3; Lipman et al.,
"Flow Matching for Generative Modeling", 2023. Shapes: B clips, N codes, T mel frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from stepaudio.train.data import Corpus
from stepaudio.train.features import Features, length_batches
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.pictures import draw_mels
from tokenizer.audio import TOKENIZER_RATE
from tokenizer.codes import LAYOUT
from tokenizer.files import make_folder

MIN_GROUPS = 4  # of codes; shorter clips are not trained on
_GRID = 4 * LAYOUT.group_seconds  # seconds from one length class of clips to the next


@dataclass(frozen=True)
class FlowStageConfig:
    """The flow stage. Sizes and the share of unconditional items are the decoder's own."""

    loop: LoopConfig
    seconds_per_batch: float = 240.0
    longest: float = 8.0  # seconds; longer clips are cropped
    prior: float = 0.3  # weight of the distance between mu and mel
    prompted: float = 0.7  # share of the items with a prompt
    prompt_share: float = 0.4  # of the frames at most are prompt
    other_clip: float = 0.5  # share of the items whose embedding is of another clip of the speaker
    test_clips: int = 48


class FlowStage(Stage):
    """Codes and speaker embeddings -> mel."""

    def __init__(self, config: FlowStageConfig, decoder: CosyVoiceConfig, folder: Path, device: torch.device) -> None:
        self.config, self.decoder, self.device = config, decoder, device
        self.model = TokenToMel(decoder.flow)
        self.clips = Corpus.open(folder).clips
        self.codes = Features.open(folder, "codes", device)
        self.mel = Features.open(folder, "mel", device)
        self.embeddings = Features.open(folder, "embedding", device)
        self.most = int(config.longest / LAYOUT.group_seconds)
        self.groups = [self.whole_groups(index) for index in range(len(self.clips))]
        self.train = [i for i, c in enumerate(self.clips) if c.split == "train" and self.groups[i] >= MIN_GROUPS]
        self.same: dict[str, list[int]] = {}
        for index in self.train:
            self.same.setdefault(self.clips[index].speaker, []).append(index)

    def whole_groups(self, index: int) -> int:
        """Groups of codes of a clip that its mel covers."""
        groups = self.codes.length(index) // LAYOUT.group
        while num_frames(groups * LAYOUT.group, self.decoder.flow) > self.mel.length(index):
            groups -= 1
        return groups

    def models(self) -> dict[str, nn.Module]:
        return {"flow": self.model}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"flow": list(self.model.parameters())}

    def batches(self, start: int) -> Iterator[list[int]]:
        samples = LAYOUT.group_seconds * TOKENIZER_RATE
        clips = [
            replace(self.clips[index], length=round(min(self.groups[index], self.most) * samples))
            for index in self.train
        ]
        batches = length_batches(clips, self.config.seconds_per_batch, self.config.loop.seed, start, _GRID)
        for indices, _ in batches:
            yield [self.train[i] for i in indices]

    def take(self, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, N], mel [B, 80, T] and embeddings [B, 192] of random crops as long as the shortest clip."""
        groups = min(self.most, *(self.groups[index] for index in indices))
        first = [int(rng.integers(self.groups[index] - groups + 1)) for index in indices]
        codes, _ = self.codes.gather(indices, groups * LAYOUT.group, [at * LAYOUT.group for at in first])
        flow = self.decoder.flow
        frames = num_frames(groups * LAYOUT.group, flow)
        per_group = LAYOUT.group / flow.input_frame_rate * flow.sample_rate / flow.hop_size
        starts = [min(round(at * per_group), self.mel.length(i) - frames) for at, i in zip(first, indices)]
        mel, _ = self.mel.gather(indices, frames, starts)
        heard = [self.voice_of(index, rng) for index in indices]
        embedding, _ = self.embeddings.gather(heard, 1)
        return codes[..., 0].long(), mel.transpose(1, 2).contiguous(), embedding[:, 0]

    def voice_of(self, index: int, rng: np.random.Generator) -> int:
        """The clip whose embedding stands for the speaker of this one."""
        others = self.same.get(self.clips[index].speaker, [index])
        return others[rng.integers(len(others))] if rng.random() < self.config.other_clip else index

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        rng = np.random.default_rng((self.config.loop.seed, step))
        flow, prior = self.losses(*self.take(batch, rng))
        optimise("flow", flow + self.config.prior * prior)
        return {"flow": flow.detach(), "prior": prior.detach()}

    def losses(self, codes: Tensor, mel: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the velocity, and mean distance of mu from the mel."""
        mu = self.model.encode(codes, mel.shape[-1]).float()
        prior = (mu - mel).abs().mean()
        kept = (torch.rand(len(mel), device=mel.device) >= self.decoder.flow.training_cfg_rate).float()
        spks = self.model.speaker(embedding) * kept[:, None]
        cond = self.prompt(mel) * kept[:, None, None]
        t = 1 - torch.cos(0.5 * math.pi * torch.rand(len(mel), device=mel.device))
        noise = torch.randn_like(mel)
        shrink = 1 - self.decoder.flow.sigma_min
        x = (1 - shrink * t[:, None, None]) * noise + t[:, None, None] * mel
        velocity = self.model.decoder.estimator(x, None, mu * kept[:, None, None], t, spks, cond)
        return F.mse_loss(velocity.float(), mel - shrink * noise), prior

    def prompt(self, mel: Tensor) -> Tensor:
        """The mel's first frames, a random number of them in each prompted row, zeros after them."""
        batch, _, frames = mel.shape
        share = torch.rand(batch, 1, device=mel.device) * self.config.prompt_share
        share = share * (torch.rand(batch, 1, device=mel.device) < self.config.prompted)
        return mel * (torch.arange(frames, device=mel.device) < (share * frames).long())[:, None]

    def finish(self, out: Path) -> None:
        folder = make_folder(out / FLOW_DIR)
        write_config(folder, self.decoder)
        write_tensors(folder / FLOW_FILE, {name: value.half() for name, value in self.model.state_dict().items()})
        (out / "scores.json").write_text(json.dumps(self.scores(out), indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def scores(self, out: Path) -> dict[str, float]:
        """Losses on held-out clips, and the distance of decoded mels (no prompt, 10 steps) from the true ones.

        Draws true mel, mu and decoded mel of three clips.
        """
        torch.manual_seed(self.config.loop.seed)
        rng = np.random.default_rng(self.config.loop.seed)
        held = [i for i, c in enumerate(self.clips) if c.split == "test" and self.groups[i] >= MIN_GROUPS]
        totals: list[tuple[float, float, float]] = []
        rows: list[dict[str, Tensor]] = []
        for index in rng.permutation(held)[: self.config.test_clips].tolist():
            codes, mel, embedding = self.take([index], rng)
            flow, prior = self.losses(codes.repeat(8, 1), mel.repeat(8, 1, 1), embedding.repeat(8, 1))
            noise = torch.randn_like(mel[0])
            nothing = torch.zeros(0, mel.shape[1], device=mel.device)
            request = FlowRequest(codes[0], codes[0, :0], nothing, embedding[0], noise)
            decoded = self.model.generate([request])[0]
            totals.append((flow.item(), prior.item(), (decoded - mel[0]).abs().mean().item()))
            mu = self.model.encode(codes, mel.shape[-1])[0]
            rows.append({self.clips[index].id: mel[0], "mu": mu, "decoded": decoded})
        if not rows:
            return {}
        draw_mels(out / "samples.png", rows[:3])
        return dict(zip(("flow", "prior", "decoded"), np.mean(totals, axis=0).round(4).tolist()))
