import numpy as np
import pytest

from stepaudio.train.features import MAKERS
from stepaudio.train.pitch import frame_count, pitch


@pytest.mark.parametrize("hertz", [70.0, 110.0, 230.0, 390.0])
def test_steady_tones(hertz):
    time = np.arange(16_000) / 16_000
    sound = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 9)).astype(np.float32) * 0.1
    assert np.abs(pitch(sound)[5:-5] / hertz - 1).max() < 1e-3


def test_a_glide_is_followed():
    time = np.arange(32_000) / 16_000
    hertz = 100 * 2 ** (time / 2)
    phase = 2 * np.pi * np.cumsum(hertz) / 16_000
    found = pitch(sum(np.sin(k * phase) / k for k in range(1, 9)).astype(np.float32) * 0.1)
    expected = np.interp((np.arange(len(found)) + 0.5) * 256 / 22050, time, hertz)
    assert np.abs(found / expected - 1)[5:-5].max() < 0.02


def test_noise_and_silence_are_unvoiced():
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    assert (pitch(noise) == 0).mean() > 0.95
    assert not pitch(np.zeros(16_000, np.float32)).any()
    assert pitch(np.zeros(20, np.float32)).shape == (0,)


@pytest.mark.parametrize("samples", [4_000, 15_999, 16_000, 16_123])
def test_f0_wave_and_mel_share_their_frames(samples):
    sound = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1
    frames = len(MAKERS["mel"](sound))
    assert frames == frame_count(samples) == len(MAKERS["f0"](sound)) == len(MAKERS["wave22"](sound)) // 256
