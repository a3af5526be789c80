import librosa
import numpy as np
import pytest
import torch

from tokenizer.log_mel import HOP_LENGTH, NUM_MELS, log_mel


def noise(length, seed=0):
    return torch.from_numpy((0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32))


def reference(samples):
    """The definition in float64, from librosa's parts."""
    spectrum = librosa.stft(
        samples.astype(np.float64), n_fft=400, hop_length=160, window="hann", center=True, pad_mode="reflect"
    )
    power = np.abs(spectrum[:, :-1]) ** 2
    mel = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128) @ power
    log = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize("length", [480, 481, 640, 1000, 16_000])
def test_equals_the_definition(length):
    mel = log_mel(noise(length))
    assert mel.dtype == torch.float32 and mel.shape == (NUM_MELS, length // HOP_LENGTH)
    assert np.abs(mel.numpy() - reference(noise(length).numpy())).max() < 1e-4


def test_silence_and_range():
    assert torch.equal(log_mel(torch.zeros(1600)), torch.full((NUM_MELS, 10), -1.5))
    click = torch.zeros(16_000)
    click[8000] = 1.0
    mel = log_mel(click)
    assert mel.max() - mel.min() == pytest.approx(2.0, abs=1e-6)  # eight decades, divided by four


def test_a_tone_lies_in_its_band():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    centres = librosa.mel_frequencies(130, fmin=0, fmax=8000)[1:-1]
    assert abs(centres[int(log_mel(tone)[:, 50].argmax())] - 1000) < 30


def test_padding_has_no_influence():
    lengths = [480, 1600, 2399, 16_000]
    padded = torch.full((4, 16_000), 50.0)
    for row, length in zip(padded, lengths):
        row[:length] = noise(length, seed=length)
    mel = log_mel(padded, torch.tensor(lengths))
    for row, length in zip(mel, lengths):
        alone = log_mel(noise(length, seed=length))
        frames = length // HOP_LENGTH
        assert (row[:, :frames] - alone).abs().max() < 2e-6
        assert not row[:, frames:].any()


def test_range_is_that_of_each_clip():
    loud, quiet = noise(3200), 1e-3 * noise(3200, seed=1)
    both = log_mel(torch.stack([loud, quiet]))
    assert (both[1] - log_mel(quiet)).abs().max() < 1e-6


def test_too_short_to_mirror():
    with pytest.raises(AssertionError, match="200"):
        log_mel(torch.zeros(200))
