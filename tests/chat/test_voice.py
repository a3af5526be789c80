"""When the words of a growing text can be spoken."""

import pytest

from stepaudio.chat.voice import Voice
from stepaudio.tts.split import finished
from tests.chat.fakes import FakeTTS


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("Hello there", ""),
        ("Hello there.", ""),
        ("Hello there. ", ""),
        ("Hello there. H", "Hello there."),
        ("It costs 3.1", ""),
        ("Dr. Smith", ""),
        ("你好。", ""),
        ("你好。”她", "你好。”"),
        ("一。二！三", "一。二！"),
        ("one\ntwo", "one\n"),
    ],
)
def test_finished_sentences(text, done):
    assert text[: finished(text)] == done


def test_short_sentences_wait_for_the_next(golden):
    tts = FakeTTS(golden / "wavs")
    voice = Voice(tts, None, None, seed=0, speed=1.0, volume=1.0, live=True)
    sounds = [voice.push(char) for char in "Hi. It is a very fine day today. Bye"]
    assert [said for said, *_ in tts.said] == ["Hi. It is a very fine day today."]
    assert sum(map(len, sounds)) == 1
    assert len(voice.flush()) == 1 and voice.flush() == []
    assert tts.said[-1] == ("Bye", None, 1)


def test_speed_and_volume_reach_direct_speech(golden):
    tts = FakeTTS(golden / "wavs")
    voice = Voice(tts, "Ann", None, seed=0, speed=2.0, volume=0.5, live=False)
    tts.decode = lambda codes, prompt, seed: tts.synthesize("x" * 10, None, None, **_OPTIONS).audio
    [audio] = voice.play(None)
    assert len(audio) == 11_025
    assert audio.samples[5000] == pytest.approx(0.05, abs=0.01)


_OPTIONS = {"seed": 0, "speed": 1.0, "volume": 1.0, "allow_any_tag": True}
