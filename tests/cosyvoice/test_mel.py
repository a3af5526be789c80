import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import MelConfig
from cosyvoice.mel import mel_spectrogram
from tokenizer.errors import RequestError

GOLDEN = Path(__file__).parents[1] / "golden" / "prompt_features"
CONFIG = MelConfig()


def test_recorded_mel():
    golden = load_file(GOLDEN / "golden.safetensors")
    mel = mel_spectrogram(golden["rand8000.wav"], CONFIG)
    assert torch.allclose(mel, golden["rand8000.mel"].T, atol=2e-4)


@pytest.mark.parametrize("count", [640, 1024, 22_050, 22_271, 22_272])
def test_one_frame_per_256_samples(count):
    assert mel_spectrogram(torch.zeros(count), CONFIG).shape == (count // 256, 80)


@pytest.mark.parametrize("count", [0, 1, 385, 639])
def test_too_short_is_refused_with_the_least_length(count):
    with pytest.raises(RequestError, match="640 samples at 22050 Hz"):
        mel_spectrogram(torch.zeros(count), CONFIG)


def test_silence_is_the_floor_of_the_log():
    mel = mel_spectrogram(torch.zeros(4096), CONFIG)
    assert torch.allclose(mel, torch.full_like(mel, math.log(1e-5)), atol=1e-5)


@pytest.mark.parametrize(("hz", "band"), [(300.0, 8), (1000.0, 26), (4000.0, 61)])
def test_a_tone_peaks_in_its_band(hz, band):
    time = torch.arange(22_050) / 22_050
    mel = mel_spectrogram(torch.sin(2 * math.pi * hz * time), CONFIG)
    assert mel[20].argmax().item() == pytest.approx(band, abs=1)


def test_batches_are_rows_and_gradients_flow():
    samples = torch.randn(2, 3, 2048, requires_grad=True)
    mel = mel_spectrogram(samples, CONFIG)
    assert mel.shape == (2, 3, 8, 80)
    assert torch.allclose(mel[1, 2], mel_spectrogram(samples[1, 2], CONFIG), atol=1e-5)
    mel.sum().backward()
    assert samples.grad.isfinite().all()
