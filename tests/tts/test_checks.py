import numpy as np
import pytest

from stepaudio.lm.base import StopReason
from stepaudio.tts.checks import check_codes, check_sound, duration_bounds, loop_seconds
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes

TEXT = "今天天气很好，我们去公园吧。"


def speech(groups, seed=0):
    rng = np.random.default_rng(seed)
    return AudioCodes.merge(rng.integers(0, 1024, 2 * groups), rng.integers(0, 4096, 3 * groups))


def repeated(codes, times):
    return AudioCodes(np.tile(codes.interleaved, times))


def kinds(codes, stop=StopReason.STOP, text=TEXT, music=False):
    return [problem.kind for problem in check_codes(codes, stop, text, music)]


@pytest.mark.parametrize(
    ("codes", "stop", "expected"),
    [
        (speech(25), StopReason.STOP, []),
        (AudioCodes([]), StopReason.STOP, ["empty"]),
        (speech(25), StopReason.LENGTH, ["length"]),
        (speech(25), StopReason.LOOP, ["loop"]),
        (speech(20) + repeated(speech(1, 1), 25), StopReason.STOP, ["loop"]),
        (speech(10) + repeated(speech(4, 1), 6), StopReason.STOP, ["loop"]),
        (speech(20) + repeated(speech(1, 1), 8), StopReason.STOP, []),  # a pause of a second
        (AudioCodes(speech(25).interleaved[1:]), StopReason.STOP, ["pattern"]),
        (speech(2), StopReason.STOP, ["short"]),
        (speech(200), StopReason.STOP, ["long"]),
    ],
)
def test_codes(codes, stop, expected):
    assert kinds(codes, stop) == expected


def test_sung_words_may_be_held():
    assert kinds(speech(150)) == ["long"]
    assert kinds(speech(150), music=True) == []


def test_loop_seconds_measures_the_stretch():
    assert loop_seconds(speech(40)) == 0
    assert loop_seconds(speech(5) + repeated(speech(2, 1), 10) + speech(5, 2)) == pytest.approx(2.4)
    assert loop_seconds(AudioCodes([])) == 0
    assert loop_seconds(speech(1)) == 0


def test_bounds_grow_with_the_text():
    short, long = duration_bounds("好"), duration_bounds("好" * 50)
    assert short[0] == 0
    assert short[1] > 3
    assert long[0] > 2
    assert long[1] < 40


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(1, 0.3)], 0),
        ([(1, 0.0)], 1),
        ([(0.5, 0.3), (3.5, 0.001), (0.5, 0.3)], 1),
        ([(0.5, 0.3), (2, 0), (1, 0.3)], 0),
        ([], 1),
    ],
)
def test_silence(parts, expected):
    samples = np.concatenate([np.zeros(0), *(np.full(int(seconds * 22050), level) for seconds, level in parts)])
    assert len(check_sound(Audio(samples.astype(np.float32), 22050))) == expected
