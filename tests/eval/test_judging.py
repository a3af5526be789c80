"""What counts as right, as nearer, as the same word; none of it loads a model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stepaudio.eval import judges
from stepaudio.eval.chat import is_right, right_arguments, times, tool_used
from stepaudio.eval.clone import choose_others
from stepaudio.eval.exam import Stranger, spelled
from stepaudio.eval.work import Answered
from stepaudio.train.domain import dialogue, tool_dialogue
from tokenizer.audio import Audio


@pytest.mark.parametrize(
    "intent, language, expected, key, said, right",
    [
        ("minus", "en", "twelve minus six is six", "six", "twelve minus six is six", True),
        ("minus", "en", "twelve minus six is six", "six", "twelve minus six is four", False),
        ("plus", "en", "one plus three is four", "four", "One plus three is twenty four.", False),
        ("plus", "en", "one plus three is four", "four", "the sum is four", True),
        ("minus", "zh", "十二减六等于六", "六", "十二减六等于十六", False),
        ("minus", "zh", "十二减六等于六", "六", "十二减六等于六", True),
        ("fact-capital", "en", "the capital of peru is lima", "lima", "it is Lima.", True),
        ("fact-colour", "en", "an orange is orange", "orange", "an orange is red", False),
        ("fact-opposite", "en", "the opposite of cold is hot", "hot", "the opposite of cold is shot", False),
        ("spell", "en", "cat is spelled c a t", "c a t", "cat is spelled c a r t", False),
        ("memory", "en", "your name is ann", "ann", "your name is anna", False),
        ("fact-capital", "zh", "法国的首都是巴黎", "巴黎", "巴黎", True),
    ],
)
def test_an_answer_is_right_if_it_says_the_key(intent, language, expected, key, said, right):
    one = replace(dialogue(intent, language, "?", expected, key), intent=intent)
    assert is_right(one, Answered(said)) is right


def test_words_are_counted_whole():
    assert times("a", "a b a a") == 3 and times("four", "twenty four fourteen") == 1 and times("c a", "c a c a") == 2


def test_a_tool_must_be_called_and_its_result_said():
    one = tool_dialogue(
        "calculator", "en", "?", {"expression": "6*7"}, "42", "six times seven is forty two", "forty two"
    )
    good = ("calculator", {"expression": "6*7"}, "42")
    other = ("calculator", {"expression": "6*6"}, "36")
    assert tool_used(one, Answered("it is forty two", (good,))) and right_arguments(one, Answered("", (good,)))
    assert not tool_used(one, Answered("it is forty", (good,))) and not tool_used(one, Answered("forty two"))
    assert tool_used(one, Answered("thirty six", (other,))) and not right_arguments(one, Answered("", (other,)))
    timer = tool_dialogue("timer", "en", "?", {"minutes": 5}, "ok", "the timer is set for five minutes", "five")
    assert tool_used(timer, Answered("the timer is set for five minutes", (("timer", {"minutes": 5}, "ok"),)))
    rain = tool_dialogue("weather", "en", "?", {"place": "rome"}, "sunny", "it is sunny in rome", "sunny")
    assert tool_used(rain, Answered("it is rainy in rome", (("weather", {"place": "rome"}, "rainy"),)))
    assert json.loads(rain.turns[1].text)["name"] == "weather"


def test_the_other_speakers_are_of_the_same_set_and_differ():
    sound = Audio(np.zeros(16000, np.float32), 16000)
    people = [Stranger(f"{part}/{i % 12}", sound, "a", None) for part in "ab" for i in range(24)]
    for one, row in zip(people, choose_others(people, 0)):
        assert len(row) == 9 == len({people[i].speaker for i in row})
        assert all(people[i].part == one.part and people[i].speaker != one.speaker for i in row)


def test_the_share_of_nearer_clones():
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    share, own, rest = judges.nearest_share([a, a], [a, b], [[b], [a]], judges.cosine)
    assert share == 0.5 and own == pytest.approx(0.5) and rest == pytest.approx(0.5)


def test_pitch_and_level_of_a_tone():
    time = np.arange(16000) / 16000
    tone = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 8)).astype(np.float32)
    loud, soft = judges.manner([Audio(0.3 * tone, 16000), Audio(0.03 * tone, 16000)])
    assert loud.f0 == pytest.approx(150, rel=0.02) and loud.level - soft.level == pytest.approx(20, abs=0.5)


def test_spellings_and_letters():
    assert judges.british("What Color is gray?") == "what colour is grey"
    assert spelled("cat is spelled c a t") and not spelled("what is a dog") and not spelled("i am a dog")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(judges.shutil, "which", lambda name: None)
    assert judges.missing("numpy") is None and "flite" in judges.missing("flite:rms")
    assert "no_such_judge" in judges.missing("no_such_judge")


def test_pocketsphinx_does_not_mind_the_level():
    pytest.importorskip("pocketsphinx")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    assert len(judges.sphinx([Audio(noise, 16000), Audio(np.zeros(22050, np.float32), 22050)])) == 2
