"""The two tokenizers of a new checkpoint: encoders that learn to recognise speech through their codebook.

Both train on CTC over phones (over characters where a corpus has no phones); the semantic one also rebuilds its
log-mel. After a share of the steps
the codebook comes between encoder and heads, so what is learnt is what survives quantisation.
Shapes: B clips, T rows or frames, S codes, D width.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio.checkpoints import ASR_DIR, TOKENIZER_DIR
from stepaudio.export.tokenizer_files import write_linguistic, write_semantic
from stepaudio.train.data import Clip, Corpus
from stepaudio.train.features import RATES, Features, length_batches, sent
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.replay import Replayed
from stepaudio.train.text import Symbols, edits, plain
from stepaudio.train.vq import RunningCodebook
from tokenizer.fbank import NUM_MELS, Cmvn
from tokenizer.files import make_folder
from tokenizer.sanm import SanmConfig, SanmEncoder
from tokenizer.semantic import SemanticConfig, SemanticEncoder


@dataclass(frozen=True)
class ListenConfig:
    """One tokenizer stage. `model` goes to SanmConfig or SemanticConfig."""

    loop: LoopConfig
    model: dict[str, Any] = field(default_factory=dict)
    codes: int = 1024  # codes in use: 1,024 linguistic, up to 4,096 semantic
    quantise_from: float = 0.35  # share of the steps before the codebook takes part
    restart_until: float = 0.85  # share of the steps until unused codes are moved
    commitment: float = 0.25
    reconstruction: float = 0.0
    seconds_per_batch: float = 240.0
    hidden_masks: int = 2  # spans of time and of frequency hidden from each clip
    graphs: bool = True  # on a CUDA device, run the encoder as captured graphs


def spoken(clip: Clip) -> list[str]:
    """What a clip says, as the tokenizers learn it: its phones, or the characters of its text."""
    return clip.phones.split() or list(plain(clip.text))


class ListenStage(Stage):
    """What both tokenizers share: batches, CTC, quantiser, score."""

    kind: str  # of features
    steps_per_code: int  # CTC steps that one code emits

    def __init__(self, config: ListenConfig, folder: Path, device: torch.device) -> None:
        self.config = config
        self.corpus = Corpus.open(folder)
        self.features = Features.open(folder, self.kind, device)
        self.clips = self.corpus.clips
        self.train = [i for i, c in enumerate(self.clips) if c.split in ("train", "noisy") and c.text]
        self.symbols = Symbols.of(spoken(self.clips[i]) for i in self.train)
        self.targets = [np.asarray(self.symbols.encode(spoken(clip))) for clip in self.clips]
        self.device = device
        self.encoder = self.make_encoder()
        width = self.encoder.config.size if self.kind == "rows" else self.encoder.config.width
        self.codebook = RunningCodebook(config.codes, width, cosine=self.kind == "log_mel")
        self.head = nn.Linear(width, self.steps_per_code * len(self.symbols))
        self.replayed = Replayed(self.hearing(), config.graphs)

    @abstractmethod
    def make_encoder(self) -> nn.Module:
        """The encoder of this stage at the configured size."""

    @abstractmethod
    def hearing(self) -> nn.Module:
        """Features [B, T, F] and lengths [B] -> vectors [B, S, D]."""

    @abstractmethod
    def counts(self, lengths: Tensor) -> Tensor:
        """Vectors of so many frames, [B] -> [B]."""

    def models(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "codebook": self.codebook, "head": self.head}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"all": [p for model in self.models().values() for p in model.parameters()]}

    def batches(self, start: int) -> Iterator[tuple[list[int], float]]:
        clips = [self.clips[i] for i in self.train]
        for indices, seconds in length_batches(clips, self.config.seconds_per_batch, self.config.loop.seed, start):
            yield [self.train[i] for i in indices], seconds

    def take(self, indices: list[int], seconds: float) -> tuple[Tensor, Tensor]:
        return self.features.gather(indices, int(seconds * RATES[self.kind]) + 1)

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        indices, seconds = batch
        share = optimise.share
        x, lengths = self.take(indices, seconds)
        vectors = self.replayed(self.hide(x), lengths.clamp(min=1)).float()
        metrics: dict[str, float | Tensor] = {}
        loss = torch.zeros((), device=x.device)
        if share >= self.config.quantise_from:
            valid = torch.arange(vectors.shape[1], device=x.device) < self.counts(lengths)[:, None]
            flat, commitment = self.codebook(
                vectors.flatten(0, 1), valid.flatten(), restart=share < self.config.restart_until
            )
            vectors = flat.view(vectors.shape)
            loss = loss + self.config.commitment * commitment
            metrics |= {"commitment": commitment.detach(), "used": self.codebook.used}
        elif self.codebook.cosine:
            vectors = F.normalize(vectors, dim=-1)
        ctc = self.ctc(vectors, indices)
        loss = loss + ctc
        metrics["ctc"] = ctc.detach()
        loss, metrics = self.also(loss, metrics, vectors, x, lengths)
        optimise("all", loss)
        return metrics

    def also(
        self, loss: Tensor, metrics: dict[str, float | Tensor], vectors: Tensor, x: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Further losses of one kind of tokenizer."""
        return loss, metrics

    def hide(self, x: Tensor) -> Tensor:
        """SpecAugment: spans of time and bands of frequency set to zero."""
        batch, frames, size = x.shape
        bands = NUM_MELS if size % NUM_MELS == 0 else size
        keep_time = torch.ones(batch, frames, device=x.device)
        keep_band = torch.ones(batch, bands, device=x.device)
        for _ in range(self.config.hidden_masks):
            for keep, longest in ((keep_time, max(1, frames // 12)), (keep_band, bands // 6)):
                length = torch.randint(0, longest + 1, (batch, 1), device=x.device)
                first = (torch.rand(batch, 1, device=x.device) * (keep.shape[1] - length)).long()
                position = torch.arange(keep.shape[1], device=x.device)
                keep[(position >= first) & (position < first + length)] = 0
        return x * keep_time[..., None] * keep_band.repeat(1, size // bands)[:, None]

    def logits(self, vectors: Tensor) -> Tensor:
        """[B, S, D] -> log-probabilities [B, S * steps, classes]."""
        if self.codebook.cosine:
            vectors = vectors * vectors.shape[-1] ** 0.5  # unit vectors would move the head too slowly
        return self.head(vectors).unflatten(-1, (self.steps_per_code, -1)).flatten(1, 2).float().log_softmax(-1)

    def ctc(self, vectors: Tensor, indices: list[int]) -> Tensor:
        """Mean over the phones of a batch. All lengths are known on the host, so that it need not ask the device."""
        targets = [self.targets[index] for index in indices]
        sizes = torch.tensor([len(target) for target in targets])
        padded = np.zeros((len(targets), max(1, int(sizes.max()))), np.int64)
        for row, target in zip(padded, targets):
            row[: len(target)] = target
        frames = torch.from_numpy(self.features.spans(indices)[1])
        counts = self.counts(frames.clamp(min=1)).clamp(max=vectors.shape[1])
        losses = F.ctc_loss(
            self.logits(vectors).transpose(0, 1),
            sent(padded, self.device),
            counts * self.steps_per_code,
            sizes,
            reduction="none",
            zero_infinity=True,
        )
        return losses.sum() / int(sizes.sum())

    @torch.inference_mode()
    def recognise(self, indices: list[int], quantise: bool = True) -> list[list[str]]:
        """Greedy phones of clips, read from their codes."""
        found = []
        for begin in range(0, len(indices), 32):
            part = indices[begin : begin + 32]
            x, lengths = self.take(part, max(self.clips[i].seconds for i in part) + 0.1)
            vectors = self.replayed.module(x, lengths.clamp(min=1))
            if quantise:
                vectors = self.codebook.codes[self.codebook.nearest(vectors.float().flatten(0, 1))].view(vectors.shape)
            best = self.logits(vectors.float()).argmax(-1).cpu()
            counts = self.counts(lengths) * self.steps_per_code
            found += [self.symbols.decode(row[:n].tolist()) for row, n in zip(best, counts.tolist())]
        return found

    def scores(self) -> dict[str, float]:
        """Phone error rate per group of test clips, read from the codes."""
        groups: dict[str, list[int]] = {}
        for index, clip in enumerate(self.clips):
            if clip.split == "test" and clip.text:
                groups.setdefault(f"{clip.speaker.split('/')[0]} {clip.language}", []).append(index)
        return {name: round(self.error(members), 4) for name, members in groups.items()}

    def error(self, members: list[int]) -> float:
        """Edits over all phones of clips."""
        true = [spoken(self.clips[i]) for i in members]
        wrong = sum(edits(found, wanted) for found, wanted in zip(self.recognise(members), true))
        return wrong / max(1, sum(map(len, true)))

    def finish(self, out: Path) -> None:
        self.export(make_folder(out / TOKENIZER_DIR))
        (out / "scores.json").write_text(json.dumps(self.scores(), indent=1) + "\n")

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the release's files of this tokenizer."""


class _Hearing(nn.Module):
    """The semantic encoder with time before features, and without the lengths of its result."""

    def __init__(self, encoder: SemanticEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder(x.transpose(1, 2), lengths)[0]


class LinguisticStage(ListenStage):
    """Fbank rows -> SANM encoder -> 1,024 Euclidean codes at 16.67 Hz."""

    kind = "rows"
    steps_per_code = 2

    def __init__(self, config: ListenConfig, folder: Path, device: torch.device) -> None:
        super().__init__(config, folder, device)
        sample = self.features.data[:: max(1, len(self.features.data) // 50_000)].float()
        self.cmvn = Cmvn(-sample.mean(0).cpu(), (1 / sample.std(0).clamp(min=0.1)).cpu() / 6)
        self.shift, self.scale = self.cmvn.shift.to(device), self.cmvn.scale.to(device)

    def make_encoder(self) -> SanmEncoder:
        return SanmEncoder(SanmConfig(**self.config.model))

    def take(self, indices: list[int], seconds: float) -> tuple[Tensor, Tensor]:
        x, lengths = super().take(indices, seconds)
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return (x + self.shift) * self.scale * valid[..., None], lengths

    def hearing(self) -> SanmEncoder:
        return self.encoder

    def counts(self, lengths: Tensor) -> Tensor:
        return lengths

    def export(self, folder: Path) -> None:
        state = {name: value.half().cpu() for name, value in self.encoder.state_dict().items()}
        write_linguistic(
            folder, ASR_DIR, self.encoder.config, state, self.cmvn, self.codebook.codes, {}, self.symbols.symbols
        )


class SemanticStage(ListenStage):
    """Log-mel -> whisper-style encoder -> cosine codes at 25 Hz; also rebuilds the log-mel."""

    kind = "log_mel"
    steps_per_code = 2

    def __init__(self, config: ListenConfig, folder: Path, device: torch.device) -> None:
        super().__init__(config, folder, device)
        size = self.encoder.config
        self.rebuild = nn.Sequential(
            nn.Conv1d(size.width, 256, 5, padding=2), nn.GELU(), nn.Conv1d(256, 4 * size.num_mels, 3, padding=1)
        )

    def models(self) -> dict[str, nn.Module]:
        return {**super().models(), "rebuild": self.rebuild}

    def make_encoder(self) -> SemanticEncoder:
        return SemanticEncoder(SemanticConfig(**self.config.model))

    def hearing(self) -> nn.Module:
        return _Hearing(self.encoder)

    def counts(self, lengths: Tensor) -> Tensor:
        for conv in (self.encoder.encoder.conv1, self.encoder.encoder.conv2):
            lengths = conv.count(lengths)
        return lengths

    def also(
        self, loss: Tensor, metrics: dict[str, float | Tensor], vectors: Tensor, x: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        rebuilt = (
            self.rebuild((vectors * vectors.shape[-1] ** 0.5).transpose(1, 2))
            .unflatten(1, (4, -1))
            .permute(0, 3, 1, 2)
            .flatten(1, 2)
        )
        frames = min(rebuilt.shape[1], x.shape[1])
        valid = (torch.arange(frames, device=x.device) < lengths[:, None]).float()[..., None]
        difference = (rebuilt[:, :frames].float() - x[:, :frames]).abs() * valid
        distance = difference.sum() / (valid.sum() * x.shape[-1])
        metrics["rebuilt"] = distance.detach()
        return loss + self.config.reconstruction * distance, metrics

    def export(self, folder: Path) -> None:
        """The codebook has a row per code in use, at most the layout's 4,096."""
        state = {name: value.float().cpu() for name, value in self.encoder.state_dict().items()}
        state["quantizer._codebook.embed"] = self.codebook.codes.cpu()
        write_semantic(folder, state, self.encoder.config.num_heads)
