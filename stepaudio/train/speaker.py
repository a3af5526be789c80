"""The speaker encoder of a new checkpoint: CAM++ that tells the corpus's speakers apart.

Trains on crops with an additive angular margin; every speaker is also heard faster and slower, as further
speakers. Recorded speakers that are never trained on say how well it separates strangers. Also writes the
embedding of every clip for the flow stage. Shapes: B crops, T fbank frames of 10 ms, E embedding, K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cosyvoice.campplus import CampPlus, CampPlusConfig
from cosyvoice.onnx_export import write_campplus_onnx
from stepaudio.checkpoints import FLOW_DIR
from stepaudio.export.decoder_files import SPEAKER_FILE
from stepaudio.train.crops import Crops
from stepaudio.train.data import COPY, Corpus
from stepaudio.train.features import Features
from stepaudio.train.graphed import GraphedStep
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from tokenizer.files import make_folder

SPEEDS = (1.0, 0.9, 1.1)  # each makes another speaker of every speaker
_EMBED_GRID, _EMBED_LONGEST = 25, 1000  # frames: clips are cut to a multiple, and to at most so many


@dataclass(frozen=True)
class SpeakerConfig:
    """The speaker stage. `model` goes to CampPlusConfig."""

    loop: LoopConfig
    model: dict[str, Any] = field(default_factory=dict)
    crops: int = 256  # per batch
    frames: tuple[int, ...] = (200, 250, 300)  # lengths of crops; one is drawn per batch
    margin: float = 0.2  # radians, reached at `margin_until`
    margin_until: float = 0.3  # share of the steps
    scale: float = 30.0  # of the cosines
    noise: float = 0.5  # share of the crops with noise
    held_out: float = 0.06  # share of the recorded speakers that are never trained on
    trial_crops: int = 10  # of each held-out speaker
    graphs: bool = True  # on a CUDA device, run each step as one captured graph


class AngularMargin(nn.Module):
    """Cross entropy of cosines, the right class made harder by an angle."""

    def __init__(self, size: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(classes, size))

    def forward(self, embedding: Tensor, classes: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, E], [B] -> loss, share of crops whose class comes first (without the margin)."""
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = F.normalize(embedding.float(), dim=1) @ F.normalize(self.weight, dim=1).T
            right = cosine.gather(1, classes[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
            harder = torch.cos((right.acos() + margin).clamp(max=torch.pi))
            loss = F.cross_entropy(self.scale * cosine.scatter(1, classes[:, None], harder), classes)
        return loss, (cosine.argmax(dim=1) == classes).float().mean()


class SpeakerStage(Stage):
    """Crops of fbanks -> CAM++ -> speakers."""

    def __init__(self, config: SpeakerConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.clips = Corpus.open(folder).clips
        self.features = Features.open(folder, "fbank80", device)
        self.crops = Crops(self.features)
        self.speeds = torch.tensor(SPEEDS, device=device)
        self.graphed = GraphedStep(device, config.graphs)
        self.train, self.unseen = split_speakers(self.clips_of(), config.held_out, config.loop.seed)
        self.encoder = CampPlus(CampPlusConfig(**config.model))
        classes = len(self.train) * len(SPEEDS)
        self.margin = AngularMargin(self.encoder.config.embedding_size, classes, config.scale)

    def clips_of(self) -> dict[str, tuple[list[int], set[int]]]:
        """Of each speaker the clips that hold a frame, and those of them that are for training."""
        speakers: dict[str, tuple[list[int], set[int]]] = {}
        for index, clip in enumerate(self.clips):
            if self.features.length(index) and COPY not in clip.speaker:
                members, train = speakers.setdefault(identity(clip.speaker), ([], set()))
                members.append(index)
                if clip.split in ("train", "noisy"):
                    train.add(index)
        return speakers

    def models(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "margin": self.margin}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"all": [p for model in self.models().values() for p in model.parameters()]}

    def batches(self, start: int) -> Iterator[tuple[Tensor, int]]:
        """Clips, offsets and classes [3, B], and frames."""
        members = np.concatenate([np.array(clips) for clips in self.train.values()])
        counts = np.array([len(clips) for clips in self.train.values()])
        first = np.cumsum(counts) - counts
        ends = np.asarray(self.features.ends)
        lengths = np.diff(ends, prepend=0)
        while True:
            rng = np.random.default_rng((self.config.loop.seed, start))
            classes = rng.integers(len(counts) * len(SPEEDS), size=self.config.crops)
            speaker = classes // len(SPEEDS)
            clips = members[first[speaker] + rng.integers(counts[speaker])]
            crops = np.stack([clips, rng.integers(lengths[clips]), classes])
            yield torch.from_numpy(crops), int(rng.choice(self.config.frames))
            start += 1

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        crops, frames = batch
        margin = torch.tensor(self.config.margin * min(1.0, optimise.share / self.config.margin_until))
        return dict(self.graphed(partial(self.learn, optimise, frames), crops, margin, kind=frames))

    def learn(self, optimise: Optimise, frames: int, crops: Tensor, margin: Tensor) -> dict[str, Tensor]:
        """One step."""
        clips, starts, classes = crops
        x = self.crops.repeat(clips, starts, round(frames * max(SPEEDS)))
        x = change_speed(x, self.speeds[classes % len(SPEEDS)], frames)
        x = hide_bands(add_noise(x, self.config.noise))
        loss, right = self.margin(self.encoder(x - x.mean(dim=1, keepdim=True)), classes, margin)
        optimise("all", loss)
        return {"loss": loss.detach(), "right": right}

    def finish(self, out: Path) -> None:
        """Writes campplus.onnx, the scores on strangers and the embedding of every clip of the corpus."""
        write_campplus_onnx(make_folder(out / FLOW_DIR) / SPEAKER_FILE, self.encoder)
        (out / "scores.json").write_text(json.dumps(self.scores(), indent=1) + "\n", encoding="utf-8")
        write_embeddings(self.folder, self.encoder, self.device)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Equal error rate of all pairs of 3 s crops of unseen speakers, for each group of speakers and over all."""
        rng = np.random.default_rng(self.config.loop.seed)
        embeddings, names = [], []
        for speaker, clips in self.unseen.items():
            chosen = [int(clip) for clip in rng.permutation(np.resize(clips, self.config.trial_crops))]
            starts = [int(rng.integers(max(1, self.features.length(clip) - 300))) for clip in chosen]
            x = self.features.repeat(chosen, 300, starts)
            embeddings.append(F.normalize(self.encoder(x - x.mean(dim=1, keepdim=True)).float(), dim=1))
            names += [speaker] * len(chosen)
        result: dict[str, float] = {"speakers": len(self.train), "unseen speakers": len(self.unseen)}
        if len(self.unseen) < 2:
            return result
        similarity = torch.cat(embeddings)
        similarity = (similarity @ similarity.T).cpu().numpy()
        groups = np.array([name.split("/")[0] for name in names])
        for group in ["all", *sorted(set(groups))]:
            keep = np.flatnonzero((groups == group) | (group == "all"))
            who = np.array(names)[keep]
            first, second = np.triu_indices(len(keep), 1)
            same = who[first] == who[second]
            if not same.all():
                result[f"EER {group}"] = round(equal_error_rate(similarity[keep[first], keep[second]], same), 4)
        return result


def identity(speaker: str) -> str:
    """Who a clip's `speaker` is: `part/voice@1.1x0.88` is one at every rate, another at every pitch."""
    voice, at, variant = speaker.partition("@")
    return f"synthetic/{voice.partition('/')[2]}@{variant.partition('x')[2]}" if at else speaker


def split_speakers(
    speakers: dict[str, tuple[list[int], set[int]]], held_out: float, seed: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Clips of the speakers to train on, and of unseen ones: those without a training clip and a share of the
    recorded ones.
    """
    known = sorted(name for name, (_, train) in speakers.items() if train)
    recorded = [name for name in known if not name.startswith("synthetic/")]
    drawn = set(np.random.default_rng(seed).permutation(recorded)[: round(held_out * len(recorded))].tolist())
    train = {name: sorted(speakers[name][1]) for name in known if name not in drawn}
    unseen = {name: clips for name, (clips, _) in sorted(speakers.items()) if name not in train}
    return train, unseen


def change_speed(x: Tensor, factor: Tensor, frames: int) -> Tensor:
    """Fbanks [B, T, 80] played faster by `factor` [B]: time shrinks and frequencies grow; [B, frames, 80].

    Time goes on being 10 ms a frame; T is at least frames times the largest factor.
    """
    length, bins = x.shape[1:]
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (20.0, 8000.0))  # edges of the filter bank
    mel = low + (torch.arange(bins, device=x.device) + 1) * ((high - low) / (bins + 1))
    hertz = 700 * torch.expm1(mel / 1127) / factor[:, None]
    band = (1127 * torch.log1p(hertz / 700) - low) / (high - low) * (bins + 1) - 1
    time = torch.arange(frames, device=x.device) * factor[:, None]
    grid = torch.stack(
        [
            (2 * band / (bins - 1) - 1)[:, None].expand(-1, frames, -1),
            (2 * time / (length - 1) - 1)[..., None].expand(-1, -1, bins),
        ],
        dim=-1,
    )
    return F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=True)[:, 0]


def add_noise(x: Tensor, share: float) -> Tensor:
    """Stationary noise of a random colour and level in a share of the crops, as powers add up."""
    batch, _, bins = x.shape
    level = x.mean(dim=(1, 2)) + torch.empty(batch, device=x.device).uniform_(-4.0, 1.0)
    colour = torch.randn(batch, 1, 8, device=x.device)
    colour = F.interpolate(colour, size=bins, mode="linear", align_corners=True)
    noise = level[:, None, None] + colour + 0.5 * torch.randn_like(x)
    loud = torch.rand(batch, 1, 1, device=x.device) < share
    return torch.where(loud, torch.logaddexp(x, noise), x)


def hide_bands(x: Tensor, widest: int = 10) -> Tensor:
    """One span of mel bands of each crop set to its mean."""
    batch, _, bins = x.shape
    width = torch.randint(0, widest + 1, (batch, 1, 1), device=x.device)
    first = (torch.rand(batch, 1, 1, device=x.device) * (bins - width)).long()
    band = torch.arange(bins, device=x.device)
    return torch.where((band >= first) & (band < first + width), x.mean(dim=1, keepdim=True), x)


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """Where as many pairs of one speaker are missed as pairs of two are taken for one. `same` [N] is bool."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(same[order]) / max(1, same.sum())
    alarms = np.cumsum(~same[order]) / max(1, (~same).sum())
    at = int(np.abs(1 - hits - alarms).argmin())
    return float((1 - hits[at] + alarms[at]) / 2)


@torch.no_grad()
def write_embeddings(folder: Path, embed: Callable[[Tensor], Tensor], device: torch.device, batch: int = 64) -> None:
    """Makes `embedding.npy` [clips, E] (not normalised) and its ends in a corpus folder out of its `fbank80`.

    `embed` takes fbanks [B, T, 80] without their mean: the module, or a session of `campplus.onnx`.
    Clips are cut to a multiple of 0.25 s and to 10 s at most, so that clips of one length share a batch.
    """
    features = Features.open(folder, "fbank80", device)
    sizes: dict[int, list[int]] = {}
    for index in range(len(features.ends)):
        size = features.length(index) // _EMBED_GRID * _EMBED_GRID
        sizes.setdefault(min(_EMBED_LONGEST, max(_EMBED_GRID, size)), []).append(index)
    rows: dict[int, np.ndarray] = {}
    for size, members in tqdm(sorted(sizes.items()), desc="embedding"):
        for indices in _portions([i for i in members if features.length(i)], batch):
            starts = [max(0, features.length(index) - size) // 2 for index in indices]
            x = features.repeat(indices, size, starts)
            rows.update(zip(indices, embed(x - x.mean(dim=1, keepdim=True)).float().cpu().numpy()))
    blank = np.zeros_like(next(iter(rows.values())))
    np.save(folder / "embedding.npy", np.stack([rows.get(i, blank) for i in range(len(features.ends))]))
    np.save(folder / "embedding_ends.npy", np.arange(1, len(features.ends) + 1))


def _portions(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])
