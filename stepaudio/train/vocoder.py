"""The vocoder of a new checkpoint: HiFT on short segments, first by spectra, then also against judges.

The harmonic source is fed with the true F0, later in part with that of the predictor, which learns beside it.
Convolutions are trained under weight norm, the form of the release. Mel and wave come from the same clips.
Sources: Li et al., "HiFTNet", 2023; Kong et al., "HiFi-GAN", 2020; Yamamoto et al., "Parallel WaveGAN", 2020.
Shapes: B segments, T mel frames, N = 256 T samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.config import CosyVoiceConfig
from cosyvoice.hift import HiFTVocoder, SourceDraws
from cosyvoice.mel import mel_spectrogram
from cosyvoice.weight_norm import fuse_weight_norm, split_weight_norm
from stepaudio.checkpoints import FLOW_DIR
from stepaudio.export.decoder_files import VOCODER_FILE, write_config, write_tensors
from stepaudio.train.data import Corpus
from stepaudio.train.discriminators import Judges, judge_loss, magnitude, maker_losses
from stepaudio.train.features import Features
from stepaudio.train.loop import LoopConfig, Optimise, Stage
from stepaudio.train.pictures import draw_mels
from tokenizer.audio import Audio, write_audio
from tokenizer.files import make_folder

RESOLUTIONS = (512, 1024, 2048)  # FFT sizes of the spectral loss; a quarter of each is its hop
_PITCH_KNEE = 20.0  # Hz: F0 errors count in Hz below it, as shares above it


@dataclass(frozen=True)
class VocoderStageConfig:
    """The vocoder stage. The vocoder's sizes are the decoder's own."""

    loop: LoopConfig
    segments: int = 64  # per batch
    frames: int = 32  # mel frames of a segment
    mel_weight: float = 15.0
    stft_weight: float = 2.5
    pitch_weight: float = 1.0
    judged_from: float = 0.4  # share of the steps before the judges and the predicted F0 take part
    own_pitch: float = 0.5  # share of the segments whose source then follows the predicted F0
    judge_weight: float = 1.0
    matching_weight: float = 4.0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (32, 64, 128, 256, 256)
    judged_resolutions: tuple[int, ...] = (512, 1024, 2048)
    spectrum_width: int = 32
    test_clips: int = 32
    test_seconds: float = 6.0  # longer clips are cut


class VocoderStage(Stage):
    """Mel -> wave at 22,050 Hz."""

    def __init__(
        self, config: VocoderStageConfig, decoder: CosyVoiceConfig, folder: Path, device: torch.device
    ) -> None:
        self.config, self.decoder, self.device = config, decoder, device
        self.clips = Corpus.open(folder).clips
        self.mel, self.f0, self.wave = (Features.open(folder, kind, device) for kind in ("mel", "f0", "wave22"))
        self.vocoder = normed(HiFTVocoder(self.decoder.hift))
        self.judges = Judges(config.periods, config.period_widths, config.judged_resolutions, config.spectrum_width)
        self.hop = self.decoder.mel.hop_size
        self.train = [i for i, c in enumerate(self.clips) if c.split == "train" and self.mel.length(i) >= config.frames]

    def models(self) -> dict[str, nn.Module]:
        return {"vocoder": self.vocoder, "judges": self.judges}

    def optimised(self) -> dict[str, list[nn.Parameter]]:
        return {"vocoder": list(self.vocoder.parameters()), "judges": list(self.judges.parameters())}

    def batches(self, start: int) -> Iterator[tuple[list[int], list[int]]]:
        """Clips and first frames of segments, every frame of the corpus as likely."""
        room = np.array([self.mel.length(index) - self.config.frames + 1 for index in self.train])
        ends = np.cumsum(room)
        while True:
            drawn = np.random.default_rng((self.config.loop.seed, start)).integers(ends[-1], size=self.config.segments)
            at = np.searchsorted(ends, drawn, side="right")
            yield [self.train[i] for i in at], (drawn - ends[at] + room[at]).tolist()
            start += 1

    def take(self, clips: list[int], starts: list[int], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mel [B, 80, T], F0 [B, T] and wave [B, N] of segments."""
        mel, _ = self.mel.gather(clips, frames, starts)
        f0, _ = self.f0.gather(clips, frames, starts)
        wave, _ = self.wave.gather(clips, frames * self.hop, [at * self.hop for at in starts])
        return mel.transpose(1, 2).contiguous(), f0[..., 0], wave[..., 0] / 32768.0

    def draws(self, batch: int, frames: int) -> SourceDraws:
        sines = self.decoder.hift.nb_harmonics + 1
        phases = (torch.rand(batch, sines, device=self.device) * 2 - 1) * torch.pi
        return SourceDraws(phases, torch.randn(batch, sines, frames * self.hop, device=self.device))

    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        config = self.config
        mel, f0, wave = self.take(*batch, config.frames)
        judged = optimise.share >= config.judged_from
        with torch.autocast(self.device.type, enabled=False):
            predicted = self.vocoder.f0_predictor(mel)
            pitch = pitch_distance(predicted, f0)
            own = torch.rand(len(mel), 1, device=self.device) < config.own_pitch * judged
            source = torch.where(own, predicted.detach(), f0)
            made = self.vocoder(mel, self.draws(len(mel), config.frames), f0=source).wav
            log_mel = (self.log_mel(made) - self.log_mel(wave)).abs().mean()
            spectral = spectral_distance(made, wave)
        loss = config.mel_weight * log_mel + config.stft_weight * spectral + config.pitch_weight * pitch
        metrics = {"mel": log_mel.detach(), "stft": spectral.detach(), "pitch": pitch.detach()}
        if judged:
            verdict = judge_loss(self.judges(wave), self.judges(made.detach()))
            optimise("judges", verdict)
            self.judges.requires_grad_(False)
            fooled, matching = maker_losses(self.judges(wave), self.judges(made))
            self.judges.requires_grad_(True)
            loss = loss + config.judge_weight * fooled + config.matching_weight * matching
            metrics |= {"judges": verdict.detach(), "fooled": fooled.detach(), "matching": matching.detach()}
        optimise("vocoder", loss)
        return metrics

    def log_mel(self, wave: Tensor) -> Tensor:
        return mel_spectrogram(wave, self.decoder.mel)

    def finish(self, out: Path) -> None:
        folder = make_folder(out / FLOW_DIR)
        write_config(folder, self.decoder)
        write_tensors(folder / VOCODER_FILE, stored(self.vocoder))
        (out / "scores.json").write_text(json.dumps(self.scores(out), indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def scores(self, out: Path) -> dict[str, float]:
        """Held-out clips through the vocoder as at inference; three of them are written as wav and drawn."""
        torch.manual_seed(self.config.loop.seed)
        held = [i for i, c in enumerate(self.clips) if c.split == "test" and self.mel.length(i) >= self.config.frames]
        chosen = np.random.default_rng(self.config.loop.seed).permutation(held)[: self.config.test_clips].tolist()
        totals: list[dict[str, float]] = []
        rows: list[dict[str, Tensor]] = []
        longest = int(self.config.test_seconds * self.decoder.sample_rate / self.hop)
        for number, index in enumerate(chosen):
            mel, f0, wave = self.take([index], [0], min(longest, self.mel.length(index)))
            made, predicted, _ = self.vocoder(mel, self.draws(1, mel.shape[2]))
            before, after = self.log_mel(wave), self.log_mel(made)
            distances = {"log mel": (after - before).abs().mean(), "stft": spectral_distance(made, wave)}
            totals.append({name: value.item() for name, value in distances.items()} | pitch_errors(predicted, f0))
            if number < 3:
                rows.append({self.clips[index].id: before[0].T, "vocoded": after[0].T})
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


def spectral_distance(made: Tensor, wave: Tensor) -> Tensor:
    """Multi-resolution STFT loss of waves [B, N]: spectral convergence plus distance of log magnitudes."""
    total = made.new_zeros(())
    for n_fft in RESOLUTIONS:
        window = torch.hann_window(n_fft, device=made.device)
        a, b = (magnitude(torch.stft(x, n_fft, n_fft // 4, window=window, return_complex=True)) for x in (made, wave))
        convergence = ((b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-3)).mean()
        total = total + convergence + (a.log() - b.log()).abs().mean()
    return total / len(RESOLUTIONS)


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
