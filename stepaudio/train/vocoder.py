"""The vocoder of a new checkpoint: HiFT on short segments, first by spectra, then also against judges.

The harmonic source is fed with the true F0, later in part with that of the predictor, which learns beside it.
Convolutions are trained under weight norm, the form of the release. Mel and wave come from the same clips. What is
kept is the average of the last weights.
Sources: Li et al., "HiFTNet", 2023; Kong et al., "HiFi-GAN", 2020; Yamamoto et al., "Parallel WaveGAN", 2020.
Shapes: B segments, T mel frames, N = 256 T samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.config import CosyVoiceConfig
from cosyvoice.hift import HiFTVocoder, SourceDraws
from cosyvoice.weight_norm import fuse_weight_norm, split_weight_norm
from stepaudio.checkpoints import FLOW_DIR
from stepaudio.export.decoder_files import VOCODER_FILE, write_config, write_tensors
from stepaudio.train.averaging import averaged, follow
from stepaudio.train.crops import Crops
from stepaudio.train.data import Corpus
from stepaudio.train.discriminators import Judges, judge_loss, maker_losses
from stepaudio.train.features import Features
from stepaudio.train.graphed import GraphedStep
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.pictures import draw_mels
from stepaudio.train.snake import fuse_snakes
from stepaudio.train.spectra import LogMel, SpectralDistance
from tokenizer.audio import Audio, write_audio
from tokenizer.files import make_folder

_PITCH_KNEE = 20.0  # Hz: F0 errors count in Hz below it, as shares above it


@dataclass(frozen=True)
class VocoderStageConfig:
    """The vocoder stage. The vocoder's sizes are the decoder's own."""

    loop: LoopConfig
    segments: int = 48  # per batch
    frames: int = 32  # mel frames of a segment
    mel_weight: float = 15.0
    stft_weight: float = 2.5
    pitch_weight: float = 1.0
    judged_from: float = 0.5  # share of the training before the judges and the predicted F0 take part
    judged_segments: int = 24  # of a batch that the judges hear
    own_pitch: float = 0.5  # share of the segments whose source then follows the predicted F0
    judge_weight: float = 1.0
    matching_weight: float = 4.0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (16, 32, 64, 128, 128)
    judged_resolutions: tuple[int, ...] = (512, 1024, 2048)
    spectrum_width: int = 32
    test_clips: int = 32
    test_seconds: float = 6.0  # longer clips are cut
    graphs: bool = True  # on a CUDA device, run each step as one captured graph


class VocoderStage(Stage):
    """Mel -> wave at 22,050 Hz."""

    def __init__(
        self, config: VocoderStageConfig, decoder: CosyVoiceConfig, folder: Path, device: torch.device
    ) -> None:
        self.config, self.decoder, self.device = config, decoder, device
        self.clips = Corpus.open(folder).clips
        kinds = [Features.open(folder, kind, device) for kind in ("mel", "f0", "wave22")]
        self.mel, self.f0, self.wave = (Crops(features) for features in kinds)
        self.frames = [kinds[0].length(index) for index in range(len(self.clips))]
        self.vocoder = normed(HiFTVocoder(self.decoder.hift))
        fuse_snakes(self.vocoder)
        self.average = averaged(self.vocoder)
        self.judges = Judges(config.periods, config.period_widths, config.judged_resolutions, config.spectrum_width)
        self.hop = self.decoder.mel.hop_size
        self.train = np.array(
            [i for i, clip in enumerate(self.clips) if clip.split == "train" and self.frames[i] >= config.frames]
        )
        self.log_mel = LogMel(decoder.mel).to(device)
        self.distance = SpectralDistance().to(device)
        self.graphed = GraphedStep(device, config.graphs)

    def models(self) -> dict[str, nn.Module]:
        return {"vocoder": self.vocoder, "judges": self.judges, "average": self.average}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"vocoder": list(self.vocoder.parameters()), "judges": list(self.judges.parameters())}

    def batches(self, start: int) -> Iterator[Tensor]:
        """Clips and first frames of segments [2, B], every frame of the corpus as likely."""
        room = np.array(self.frames)[self.train] - self.config.frames + 1
        ends = np.cumsum(room)
        while True:
            drawn = np.random.default_rng((self.config.loop.seed, start)).integers(ends[-1], size=self.config.segments)
            at = np.searchsorted(ends, drawn, side="right")
            yield torch.from_numpy(np.stack([self.train[at], drawn - ends[at] + room[at]]))
            start += 1

    def take(self, clips: Tensor, starts: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mel [B, 80, T], F0 [B, T] and wave [B, N] of segments."""
        mel = self.mel.take(clips, starts, frames).transpose(1, 2).contiguous()
        wave = self.wave.take(clips, starts * self.hop, frames * self.hop)
        return mel, self.f0.take(clips, starts, frames)[..., 0], wave[..., 0] / 32768.0

    def draws(self, batch: int, frames: int) -> SourceDraws:
        """Random phases of the sines, and one noise for all of them."""
        sines = self.decoder.hift.nb_harmonics + 1
        phases = (torch.rand(batch, sines, device=self.device) * 2 - 1) * torch.pi
        return SourceDraws(phases, torch.randn(batch, 1, frames * self.hop, device=self.device))

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        judged = optimise.share >= self.config.judged_from
        metrics = self.graphed(partial(self.learn, optimise, judged), batch, kind=judged)
        follow(self.average, self.vocoder, step)
        return dict(metrics)

    def learn(self, optimise: Optimise, judged: bool, segments: Tensor) -> dict[str, Tensor]:
        """One step on segments [2, B]; the judges' first, if they take part."""
        config = self.config
        mel, f0, wave = self.take(*segments, config.frames)
        with torch.autocast(self.device.type, enabled=False):
            predicted = self.vocoder.f0_predictor(mel)
            pitch = pitch_distance(predicted, f0)
            own = torch.rand(len(mel), 1, device=self.device) < config.own_pitch * judged
            source = torch.where(own, predicted.detach(), f0)
            made = self.vocoder(mel, self.draws(len(mel), config.frames), f0=source).wav
            log_mel = (self.log_mel(made) - self.log_mel(wave)).abs().mean()
            spectral = self.distance(made, wave)
        loss = config.mel_weight * log_mel + config.stft_weight * spectral + config.pitch_weight * pitch
        metrics = {"mel": log_mel, "stft": spectral, "pitch": pitch}
        if judged:
            verdict, fooled, matching = self.judge(optimise, made, wave)
            loss = loss + config.judge_weight * fooled + config.matching_weight * matching
            metrics |= {"judges": verdict, "fooled": fooled, "matching": matching}
        optimise("vocoder", loss)
        return {name: value.detach() for name, value in metrics.items()}

    def judge(self, optimise: Optimise, made: Tensor, wave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teaches the judges; their loss, and the vocoder's two against them."""
        made, wave = made[: self.config.judged_segments], wave[: self.config.judged_segments]
        verdict = judge_loss(self.judges(wave), self.judges(made.detach()))
        optimise("judges", verdict)
        self.judges.requires_grad_(False)
        with torch.no_grad():
            real = self.judges(wave)
        fooled, matching = maker_losses(real, self.judges(made))
        self.judges.requires_grad_(True)
        return verdict, fooled, matching

    def finish(self, out: Path) -> None:
        folder = make_folder(out / FLOW_DIR)
        write_config(folder, self.decoder)
        write_tensors(folder / VOCODER_FILE, stored(self.average))
        (out / "scores.json").write_text(json.dumps(self.scores(out), indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def scores(self, out: Path) -> dict[str, float]:
        """Held-out clips through the vocoder as at inference; three of them are written as wav and drawn."""
        torch.manual_seed(self.config.loop.seed)
        held = [i for i, c in enumerate(self.clips) if c.split == "test" and self.frames[i] >= self.config.frames]
        chosen = np.random.default_rng(self.config.loop.seed).permutation(held)[: self.config.test_clips].tolist()
        totals: list[dict[str, float]] = []
        rows: list[dict[str, Tensor]] = []
        longest = int(self.config.test_seconds * self.decoder.sample_rate / self.hop)
        for number, index in enumerate(chosen):
            clip = torch.tensor([index], device=self.device)
            mel, f0, wave = self.take(clip, torch.zeros_like(clip), min(longest, self.frames[index]))
            made, predicted, _ = self.average(mel, self.draws(1, mel.shape[2]))
            before, after = self.log_mel(wave), self.log_mel(made)
            distances = {"log mel": (after - before).abs().mean(), "stft": self.distance(made, wave)}
            totals.append({name: value.item() for name, value in distances.items()} | pitch_errors(predicted, f0))
            if number < 3:
                rows.append({self.clips[index].id: before[0], "vocoded": after[0]})
                for name, sound in (("true", wave), ("vocoded", made)):
                    audio = Audio(sound[0].cpu().numpy(), self.decoder.sample_rate)
                    write_audio(out / f"sample{number}_{name}.wav", audio)
        if not rows:
            return {}
        draw_mels(out / "samples.png", rows)
        return {name: round(float(np.nanmean([row[name] for row in totals])), 4) for name in totals[0]}


def normed(vocoder: HiFTVocoder) -> HiFTVocoder:
    """Puts weight norm on the convolutions that have it in the release."""
    for name, module in vocoder.named_modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and not name.startswith("source_downs"):
            weight_norm(module)
    return vocoder


def stored(vocoder: HiFTVocoder) -> dict[str, Tensor]:
    """The release's keys, matrices in half precision; the gains are the exact norms of the halved directions."""
    plain = fuse_weight_norm({name: value.cpu() for name, value in vocoder.state_dict().items()}, "vocoder")
    halved = {name: value.half() if value.ndim > 1 else value for name, value in plain.items()}
    split = split_weight_norm({name: value.float() for name, value in halved.items()})
    return {name: value if name.endswith("_g") or value.ndim == 1 else value.half() for name, value in split.items()}


def pitch_distance(predicted: Tensor, f0: Tensor) -> Tensor:
    """Mean distance on a scale that is straight near 0 Hz and logarithmic in the range of voices."""
    return (torch.log1p(predicted / _PITCH_KNEE) - torch.log1p(f0 / _PITCH_KNEE)).abs().mean()


def pitch_errors(predicted: Tensor, f0: Tensor, threshold: float = 10.0) -> dict[str, float]:
    """Share of frames with wrong voicing; of those voiced in both, share off by a fifth or more, and median error."""
    both = (predicted > threshold) & (f0 > threshold)
    off = (predicted[both] / f0[both]).log2().abs()
    return {
        "voicing errors": ((predicted > threshold) != (f0 > threshold)).float().mean().item(),
        "gross pitch errors": (off > math.log2(1.2)).float().mean().item(),
        "pitch error": off.median().item() if both.any() else float("nan"),  # octaves
    }
