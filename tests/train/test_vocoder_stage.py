import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from cosyvoice.config import CosyVoiceConfig, HiFTConfig, read_config
from cosyvoice.hift import HiFTVocoder
from cosyvoice.mel import mel_spectrogram
from stepaudio.train import run
from stepaudio.train.loop import LoopConfig, fit
from stepaudio.train.spectra import LogMel, SpectralDistance
from stepaudio.train.vocoder import VocoderStage, VocoderStageConfig, pitch_distance, pitch_errors

CPU = torch.device("cpu")
DECODER = CosyVoiceConfig(
    hift=HiFTConfig(
        base_channels=32,
        f0_cond_channels=32,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
        source_resblock_kernel_sizes=(3, 3),
        source_resblock_dilation_sizes=((1,), (1,)),
    )
)


def config(steps, **changes):
    base = VocoderStageConfig(
        LoopConfig(steps=steps, rate=2e-3, warmup=0.02, betas=(0.8, 0.99), clip=100.0),
        segments=4,
        frames=16,
        judged_from=0.95,
        periods=(2, 3),
        period_widths=(8, 16),
        judged_resolutions=(512,),
        spectrum_width=8,
        test_clips=2,
    )
    return replace(base, **changes)


@pytest.fixture
def corpus(tones):
    return tones("mel", "f0", "wave22")


def distance(stage):
    """Log-mel distance of a clip that is trained on."""
    torch.manual_seed(0)
    mel, f0, wave = stage.take(*torch.zeros(2, 1, dtype=torch.long), 64)
    with torch.no_grad():
        made = stage.average(mel, stage.draws(1, 64), f0=f0).wav
    return (stage.log_mel(made) - stage.log_mel(wave)).abs().mean().item()


def test_overfits_resumes_and_exports(corpus, logged, tmp_path):
    out = tmp_path / "out"
    assert fit(VocoderStage(config(30), DECODER, corpus, CPU), config(30).loop, out, CPU) == 30
    stage = VocoderStage(config(90), DECODER, corpus, CPU)
    before = distance(stage)
    assert fit(stage, config(90).loop, out, CPU) == 90
    assert distance(stage) < before / 3
    pitch = logged(out, "pitch")
    assert len(pitch) == 90 and np.mean(pitch[-20:]) < np.mean(pitch[:5]) / 2
    assert np.isfinite(logged(out, "judges")).all() and len(logged(out, "matching")) >= 1

    folder = out / "CosyVoice-300M-25Hz"
    assert read_config(folder) == DECODER
    assert {"conv_pre.weight_g", "conv_pre.weight_v"} <= torch.load(folder / "hift.pt").keys()
    loaded = HiFTVocoder.from_file(folder / "hift.pt", DECODER.hift)
    mel, f0, _ = stage.take(*torch.zeros(2, 1, dtype=torch.long), 40)
    draws = stage.draws(1, 40)
    with torch.no_grad():
        ours, theirs = (one(mel, draws, f0=f0).wav for one in (stage.average, loaded))
    assert torch.allclose(ours, theirs, atol=5e-3)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["log mel"] > 0 and 0 <= scores["voicing errors"] <= 1
    samples, rate = soundfile.read(out / "sample0_vocoded.wav")
    assert rate == 22050 and len(samples) % 256 == 0 and (out / "samples.png").exists()


@pytest.mark.gpu
def test_learns_as_graphs(corpus, learns_as_graphs):
    settings = config(60, judged_from=0.5, segments=8, judged_segments=4)
    learns_as_graphs(
        lambda graphs: VocoderStage(replace(settings, graphs=graphs), DECODER, corpus, torch.device("cuda")), "mel"
    )


def test_segments_of_wave_and_mel_belong_together(corpus):
    stage = VocoderStage(config(1), DECODER, corpus, CPU)
    clips, starts = next(stage.batches(3))
    again, _ = next(stage.batches(3))
    assert torch.equal(clips, again) and all(stage.clips[clip].split == "train" for clip in clips)
    mel, f0, wave = stage.take(clips, starts, 16)
    assert mel.shape == (4, 80, 16) and f0.shape == (4, 16) and wave.shape == (4, 16 * 256)
    inside = stage.log_mel(wave)[:, :, 3:-3]  # away from the cut
    assert (inside - mel[:, :, 3:-3]).abs().mean() < 0.02
    pitches = {0: 110.0, 1: 150.0, 2: 210.0, 3: 290.0}
    for clip, row in zip(clips.tolist(), f0):
        assert abs(row[row > 0].median() / pitches[clip % 4] - 1) < 0.02


def test_spectral_distance_is_zero_only_for_equal_spectra():
    wave, distance = torch.randn(2, 8192) * 0.1, SpectralDistance()
    assert distance(wave, wave) < 1e-4
    assert distance(0.5 * wave, wave) > 1.0
    assert distance(torch.zeros(2, 8192, requires_grad=True), wave).isfinite()


def test_log_mel_is_the_decoders():
    wave = torch.randn(2, 5000) * 0.1
    plain = mel_spectrogram(wave, DECODER.mel).transpose(1, 2)
    difference = (LogMel(DECODER.mel)(wave) - plain).abs()
    print(f"log-mel: max {difference.max():.2e}, mean {difference.mean():.2e}")
    assert difference.max() < 1e-4


def test_pitch_measures():
    truth = torch.tensor([[0.0, 100.0, 200.0, 200.0]])
    assert pitch_distance(truth, truth) == 0
    errors = pitch_errors(torch.tensor([[50.0, 100.0, 400.0, 200.0]]), truth)
    assert errors["voicing errors"] == 0.25 and errors["gross pitch errors"] == pytest.approx(1 / 3)
    assert errors["pitch error"] == 0


def test_shipped_config(request):
    folder = request.config.rootpath / "configs" / "train" / "nano"
    assert run.read_config(folder / "vocoder.yaml", VocoderStageConfig).loop.steps > 1000
    size = sum(p.numel() for p in HiFTVocoder(read_config(folder).hift).parameters())
    assert 2.5e6 < size < 4e6
