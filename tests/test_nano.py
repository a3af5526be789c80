"""The bundled checkpoint: what it is promised to do is asserted in words, not shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stepaudio.chat.engine import CHAT_SAMPLING, StepAudio
from stepaudio.checkpoints import BUNDLED
from stepaudio.doctor import diagnose
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.text import error_rate

GREEDY = replace(CHAT_SAMPLING, temperature=0.0)


@pytest.fixture(scope="module")
def chat() -> StepAudio:
    return StepAudio.from_dir(BUNDLED, text_only=True)


@pytest.mark.parametrize(
    "turns, word",
    [
        (["what is the capital of france"], "paris"),
        (["i want to know the capital of peru"], "lima"),
        (["法国的首都是什么"], "巴黎"),
        (["say the opposite of hot"], "cold"),
        (["name the month after june"], "july"),
        (["how do you spell cat"], "c a t"),
        (["who won the game last night"], "do not know"),
        (["call me bob", "nice to meet you bob", "who am i"], "bob"),
        (["我叫小明", "很高兴认识你小明", "我叫什么名字"], "小明"),
    ],
)
def test_it_answers_in_its_domain(chat, turns, word):
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    assert word in chat.reply(messages, sampling=GREEDY).text


def test_it_calls_a_tool_and_uses_the_result(chat):
    question = [{"role": "user", "content": "how much is six times seven"}]
    reply = chat.reply(question, sampling=GREEDY, tools=nano_tools())
    assert [(call.name, call.result) for call in reply.calls] == [("calculator", "42")]
    assert "forty two" in reply.text


@pytest.fixture(scope="module")
def talker() -> StepAudio:
    return StepAudio.from_dir(BUNDLED)


@pytest.mark.parametrize(
    ("speaker", "text", "answer"),
    [
        ("rms", "the capital of france is paris", ""),
        ("slt", "what colour is the sky", "blue"),
        ("mei", "法国的首都是哪里", "巴黎"),
    ],
)
def test_it_speaks_is_understood_and_answers_what_it_hears(talker, speaker, text, answer):
    speech = talker.tts.synthesize(text, speaker=speaker, seed=0)
    assert 1.0 < speech.seconds < 5.0 and not speech.problems
    assert error_rate([(talker.transcribe(speech.audio), text)]) <= 0.2
    if answer:
        heard = [{"role": "human", "content": {"type": "audio", "audio": speech.audio}}]
        assert answer in talker.reply(heard, sampling=GREEDY).text


def test_it_is_whole_and_small():
    assert not [finding for finding in diagnose(BUNDLED, device="cpu").findings if finding.broken]
    files = [path for path in Path(BUNDLED).rglob("*") if path.is_file() and not path.is_symlink()]
    assert max(path.stat().st_size for path in files) <= 40e6
    assert sum(path.stat().st_size for path in files) <= 80e6
