import numpy as np
import pytest

from stepaudio.tts.effects import change_speed, change_volume, join
from tokenizer.audio import Audio, read_audio
from tokenizer.errors import RequestError

RATE = 22_050


def tone(seconds, hertz=220.0, level=0.5):
    return Audio(level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32), RATE)


def pitch(audio):
    spectrum = np.abs(np.fft.rfft(audio.samples * np.hanning(len(audio)), 2**19))
    return float(np.argmax(spectrum)) * audio.sample_rate / 2**19


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.25, 2.0])
def test_speed_keeps_pitch_level_and_length_of_a_tone(ratio):
    audio = tone(2.0, 217.3)
    changed = change_speed(audio, ratio)
    assert len(changed) == round(len(audio) / ratio)
    assert pitch(changed) == pytest.approx(217.3, rel=0.002)
    middle = changed.samples[2000:-2000]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.01)
    assert np.std(middle) == pytest.approx(0.5 / 2**0.5, rel=0.01)


def median_pitch(audio):
    """Median over voiced 50 ms frames of the autocorrelation peak between 60 and 400 Hz."""
    size, low, high = int(0.05 * audio.sample_rate), audio.sample_rate // 400, audio.sample_rate // 60
    found = []
    for start in range(0, len(audio) - size, size // 4):
        frame = audio.samples[start : start + size]
        spectrum = np.fft.rfft(frame * np.hanning(size), 4 * size)
        correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: high + 2]
        lag = low + int(np.argmax(correlation[low:high]))
        if np.std(frame) > 0.02 and correlation[lag] > 0.5 * correlation[0]:
            left, middle, right = correlation[lag - 1 : lag + 2]
            found.append(audio.sample_rate / (lag + 0.5 * (left - right) / (left - 2 * middle + right)))
    return float(np.median(found))


@pytest.mark.parametrize("ratio", [0.5, 0.7, 1.5])
@pytest.mark.parametrize("clip", ["clip0_22k.wav", "clip1_16k.wav"])
def test_speed_keeps_the_pitch_of_speech(golden, clip, ratio):
    audio = read_audio(golden / "wavs" / clip)
    assert median_pitch(change_speed(audio, ratio)) == pytest.approx(median_pitch(audio), rel=0.01)


@pytest.mark.parametrize("length", [0, 1, 100, 883, 5000])
def test_speed_of_short_and_silent_clips(length):
    for samples in (np.zeros(length), np.random.default_rng(0).normal(0, 0.1, length)):
        assert len(change_speed(Audio(samples.astype(np.float32), RATE), 1.3)) == round(length / 1.3)


def test_speed_one_is_the_same_sound():
    audio = tone(0.3)
    assert change_speed(audio, 1.0) is audio


def test_volume_below_the_limit_is_a_plain_gain():
    np.testing.assert_allclose(change_volume(tone(0.2), 1.5).samples, 1.5 * tone(0.2).samples, rtol=1e-6)


def test_volume_never_clips_and_leaves_quiet_parts_their_gain():
    audio = Audio(np.concatenate([tone(0.5, level=0.05).samples, tone(0.5, level=0.9).samples]), RATE)
    louder = change_volume(audio, 4.0).samples
    assert np.abs(louder).max() <= 0.9901
    assert np.abs(louder[: RATE // 4]).max() == pytest.approx(0.2, rel=0.01)
    assert np.abs(louder[-RATE // 4 :]).max() == pytest.approx(0.99, rel=0.02)


@pytest.mark.parametrize(
    ("effect", "value"),
    [
        (change_speed, 0.4),
        (change_speed, 2.1),
        (change_volume, 0),
        (change_volume, float("nan")),
        (change_speed, "2"),
        (change_speed, True),
    ],
)
def test_ratios_outside_the_range_are_refused(effect, value):
    with pytest.raises(RequestError, match="outside"):
        effect(tone(0.1), value)


def test_join_has_no_click_and_a_known_length():
    pieces = [Audio(np.full(RATE, 0.5, np.float32), RATE)] * 3
    joined = join(pieces)
    assert len(joined) == 3 * RATE + 2 * int(0.12 * RATE)
    assert np.abs(np.diff(joined.samples)).max() < 0.01
    assert joined.samples[0] == joined.samples[-1] == 0.5
    assert join(pieces[:1]) is pieces[0]
