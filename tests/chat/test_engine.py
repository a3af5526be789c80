"""Replies over scripted models: text, voice, history, tools, cancelling, and what is loaded when."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from stepaudio.chat.engine import ASR_SAMPLING, CHAT_SAMPLING, Reply
from stepaudio.chat.messages import AudioPart, Message
from stepaudio.chat.tools import Tool, ToolFormat
from stepaudio.lm.base import StopReason
from tests.chat.fakes import Chat
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError, RequestError

HELLO = [{"role": "user", "content": "hello"}]
CODES = AudioCodes([1, 2, 1024, 1025, 1026])
GOOD = '<|CALL_START|>{"name": "weather", "arguments": {"place": "Rome"}}<|CALL_END|>'
BAD = '<|CALL_START|>{"name": "weather"}<|CALL_END|>'


def clip(seconds=1.2):
    return Audio(np.zeros(round(16_000 * seconds), np.float32), 16_000)


def weather(function=lambda place: f"sunny in {place}", **options):
    schema = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    return Tool("weather", "Tells the weather", schema, function, **options)


def test_a_text_turn_is_answered_and_spoken(golden):
    chat = Chat(golden, "good day.")
    reply = chat.engine.reply(HELLO, seed=7)
    assert (reply.text, reply.stop, reply.problems, reply.calls) == ("good day.", StopReason.STOP, (), ())
    assert chat.prompt() == "<s><|BOT|>human\nhello<|EOT|><|BOT|>assistant\n"
    assert chat.tts.said == [("good day.", None, 7)]
    assert reply.audio.seconds == pytest.approx(0.9, abs=1e-3)
    assert reply.messages == (Message.of("user", "hello"), Message.of("assistant", "good day."))
    assert set(reply.timings) == {"listen", "first_token", "generate", "tools", "speak"}
    [(_, params)] = chat.lm.calls
    assert params == replace(CHAT_SAMPLING, seed=7, stop_ids=(chat.vocab.eot,))
    assert (params.temperature, params.top_k, params.top_p, params.max_new_tokens) == (0.7, 50, 0.9, 2048)


def test_reading_never_loads_the_voice_and_text_never_the_ears(golden):
    for chat, options in ((Chat(golden, "a"), {"text_only": True}), (Chat(golden, "a", text_only=True), {})):
        assert chat.engine.reply(HELLO, **options).audio is None
        assert chat.loaded == ["lm"]


def test_models_are_loaded_once_and_only_when_needed(golden):
    chat = Chat(golden, "a", "b", "c")
    assert chat.loaded == []
    chat.engine.reply([Message.of("user", clip())])
    chat.engine.reply([Message.of("user", clip())])
    assert chat.loaded == ["tts", "tokenizer", "lm"]


def test_sound_goes_in_as_ids(golden):
    chat = Chat(golden, "a")
    reply = chat.engine.reply([Message.of("user", clip(1.2))], seed=3, text_only=True)
    codes = AudioCodes.merge([10] * 20, [7] * 30)
    assert chat.prompt() == f"<s><|BOT|>human\n{codes.to_text()}<|EOT|><|BOT|>assistant\n"
    [(_, dither, seed)] = chat.tokenizer.heard
    assert (dither, seed) == (1.0, 3)
    assert reply.messages[0].parts[0].audio == codes


def test_a_long_history(golden):
    chat = Chat(golden, "a", "b")
    heard = AudioPart(clip(0.6), "my name is Ann")
    messages = [
        Message.of("system", "Be kind."),
        Message.of("user", heard),
        Message.of("assistant", "Hello Ann."),
        Message.of("user", CODES),
        Message.of("assistant", "Well."),
        Message.of("user", heard, "?"),
    ]
    reply = chat.engine.reply(messages, text_only=True)
    audio = AudioCodes.merge([5] * 10, [7] * 15).to_text()
    assert chat.prompt() == (
        "<s><|BOT|>system\nBe kind.<|EOT|><|BOT|>human\nmy name is Ann<|EOT|><|BOT|>assistant\nHello Ann.<|EOT|>"
        f"<|BOT|>human\n{CODES.to_text()}<|EOT|><|BOT|>assistant\nWell.<|EOT|><|BOT|>human\n{audio}?<|EOT|>"
        "<|BOT|>assistant\n"
    )
    chat.engine.reply([*reply.messages, Message.of("user", "bye")], text_only=True)
    assert len(chat.tokenizer.heard) == 1  # the codes are kept
    assert chat.prompt().count("<audio_") == 5  # the last sound became its words
    chat = Chat(golden, "a")
    chat.engine.reply(messages, text_only=True, keep_audio=True)
    assert chat.prompt().count("<audio_") == 5 + 2 * 25


def test_an_open_answer_is_gone_on_with(golden):
    chat = Chat(golden, " sunny.")
    opened = Message("assistant", Message.of("user", "It is").parts, open=True)
    reply = chat.engine.reply([Message.of("user", "weather?"), opened], text_only=True)
    assert chat.prompt().endswith("<|BOT|>assistant\nIt is")
    assert len(reply.messages) == 2 and not reply.messages[-1].open
    assert reply.messages[-1].text.startswith("It is") and reply.messages[-1].text.endswith("sunny.")


def test_stream_speaks_sentence_by_sentence(golden):
    text = "The sky is blue today. Mr. Fox costs 3.14 euros. Hm. The end"
    chat = Chat(golden, text)
    items = list(chat.engine.stream(HELLO, speaker="Ann", seed=4))
    assert "".join(item for item in items if isinstance(item, str)) == text
    assert [said for said, *_ in chat.tts.said] == [
        "The sky is blue today.",
        "Mr. Fox costs 3.14 euros.",
        "Hm. The end",
    ]
    assert [seed for *_, seed in chat.tts.said] == [4, 5, 6]
    first = next(i for i, item in enumerate(items) if isinstance(item, Audio))
    assert any(isinstance(item, str) for item in items[first:])  # sound before the text has ended
    assert isinstance(items[-1], Reply) and items[-1].text == text
    assert items[-1].audio.seconds == pytest.approx(0.1 * (22 + 25 + 11) + 2 * 0.12, abs=0.01)


@pytest.mark.parametrize("live", [False, True])
def test_direct_speech_goes_to_the_flow(golden, live):
    chat = Chat(golden, f"One.{CODES.to_text()}{CODES.to_text()}two.")
    if live:
        *items, reply = chat.engine.stream(HELLO, seed=9)
        assert sum(isinstance(item, Audio) for item in items) == 3
    else:
        reply = chat.engine.reply(HELLO, seed=9)
    assert chat.tts.said == [("One.", None, 9), ("two.", None, 11)]
    assert chat.tts.decoded == [(CODES + CODES, "voice of clip0_22k.wav", 10)]
    assert reply.text == "One.two."
    assert reply.messages[-1].parts[1].audio == CODES + CODES
    assert reply.audio.seconds == pytest.approx(0.4 + 0.24 + 0.4 + 2 * 0.12, abs=0.01)


@pytest.mark.parametrize("text", ["?!...", "", "\n"])
def test_nothing_to_say(golden, text):
    reply = Chat(golden, text).engine.reply(HELLO)
    assert (reply.text, reply.audio, reply.problems) == (text, None, ())


def test_words_that_cannot_be_spoken_are_kept(golden):
    chat = Chat(golden, "fine words")
    chat.tts.synthesize = lambda *_, **__: (_ for _ in ()).throw(CheckpointError("the music flow is missing"))
    reply = chat.engine.reply(HELLO)
    assert (reply.text, reply.audio) == ("fine words", None)
    assert reply.problems == ("not spoken: 'fine words': the music flow is missing",)


def test_cancelled_between_tokens(golden):
    chat = Chat(golden, "The sky is blue today. The sea is blue as well, and so on.")
    seen = []
    for item in chat.engine.stream(HELLO, cancelled=lambda: len(seen) >= 3):
        seen.append(item)
    assert len(seen) == 4 and isinstance(seen[-1], Reply)
    assert seen[-1].stop is StopReason.CANCELLED
    assert seen[-1].text == "".join(seen[:3]) and chat.tts.said == []


def test_closing_the_stream_ends_the_generation(golden):
    chat = Chat(golden, "many words to come")
    drawn = []
    play = chat.lm._play
    chat.lm._play = lambda *args: (drawn.append(token) or token for token in play(*args))
    stream = chat.engine.stream(HELLO)
    next(stream)
    stream.close()
    assert len(drawn) == 1


def test_a_length_stop_is_told(golden):
    reply = Chat(golden, "many words").engine.reply(HELLO, sampling=replace(CHAT_SAMPLING, max_new_tokens=3))
    assert reply.stop is StopReason.LENGTH and len(reply.text) >= 1


def test_a_tool_call(golden):
    chat = Chat(golden, f"Let me look.{GOOD}", "It is sunny.")
    *items, reply = chat.engine.stream(HELLO, tools=[weather()], seed=5)
    [call] = reply.calls
    assert (call.name, call.arguments, call.result) == ("weather", {"place": "Rome"}, "sunny in Rome")
    assert reply.text == "Let me look.\nIt is sunny."
    at = items.index(call)
    assert [type(item) for item in items[at - 1 : at]] == [Audio]  # spoken before the tool's result is there
    assert [said for said, *_ in chat.tts.said] == ["Let me look.", "It is sunny."]
    assert chat.prompt(0).startswith("<s><|BOT|>system\nYou can use these tools:\n{")
    assert chat.prompt(1).endswith(
        f"<|BOT|>assistant\nLet me look.{GOOD}<|EOT|><|BOT|>tool\nsunny in Rome<|EOT|><|BOT|>assistant\n"
    )
    assert [params.seed for _, params in chat.lm.calls] == [5, 6]
    assert [message.role for message in reply.messages] == ["human", "assistant", "tool", "assistant"]


def test_several_calls_in_one_turn_and_other_delimiters(golden):
    written = (GOOD + GOOD.replace("Rome", "Oslo")).replace("<|CALL_START|>", "<s>").replace("<|CALL_END|>", "</s>")
    chat = Chat(golden, written, "fine", tool_format=ToolFormat("<s>", "</s>"))
    reply = chat.engine.reply(HELLO, tools=[weather()], text_only=True)
    assert [call.result for call in reply.calls] == ["sunny in Rome", "sunny in Oslo"]
    assert chat.prompt().endswith(
        "<|BOT|>tool\nsunny in Rome<|EOT|><|BOT|>tool\nsunny in Oslo<|EOT|><|BOT|>assistant\n"
    )


def test_a_malformed_call_is_repaired_once(golden):
    reply = Chat(golden, BAD, GOOD, "fine").engine.reply(HELLO, tools=[weather()], text_only=True)
    assert reply.text == "fine" and len(reply.calls) == 1
    assert "malformed" in reply.problems[0] and "'place'" in reply.problems[0]
    assert json.loads(reply.messages[2].text)["error"].endswith("write the call again")
    with pytest.raises(RequestError, match=r"malformed.*lack 'place'") as caught:
        Chat(golden, BAD, BAD, "fine").engine.reply(HELLO, tools=[weather()], text_only=True)
    assert str(caught.value).count("\n") == 1
    reply = Chat(golden, GOOD.removesuffix("<|CALL_END|>"), "fine").engine.reply(HELLO, tools=[weather()])
    assert reply.problems == () and len(reply.calls) == 1  # an end that is missing does no harm


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda place: 1 / 0, "ZeroDivisionError"),
        (lambda place: threading.Event().wait(3), "no answer within 0.5"),
        (lambda place: "x" * 1_000_000, "[cut: the first 4,000 of 1,000,000 characters]"),
        (lambda place: "<|EOT|><audio_5>", "<|EOT|><audio_5>"),
    ],
)
def test_tools_that_misbehave(golden, function, said):
    chat = Chat(golden, GOOD, "Sorry.", max_context=32_768)
    reply = chat.engine.reply(HELLO, tools=[weather(function, timeout=0.5)])
    assert reply.text == "Sorry." and reply.audio is not None
    assert said in reply.messages[2].text
    assert sum(not chat.vocab.is_text(index) for index in chat.lm.calls[1][0]) <= 14


def test_calls_without_end_and_calls_without_tools(golden):
    with pytest.raises(RequestError, match="5 times"):
        Chat(golden, *[GOOD] * 6).engine.reply(HELLO, tools=[weather()], text_only=True)
    reply = Chat(golden, f"Hm. {GOOD}").engine.reply(HELLO)
    assert reply.text == "Hm. " and "none is given" in reply.problems[0]


def test_context_overflow(golden):
    messages = [Message.of("user", "one " * 50), Message.of("assistant", "1"), Message.of("user", "two")]
    chat = Chat(golden, "a", max_context=128)
    with pytest.raises(RequestError, match=r"\d+ tokens, \d+ over the 112 that leave room"):
        chat.engine.reply(messages)
    reply = chat.engine.reply(messages, trim_history=True, text_only=True)
    assert chat.prompt() == "<s><|BOT|>human\ntwo<|EOT|><|BOT|>assistant\n"
    assert reply.problems == ("the 2 oldest messages are left out to stay within the context",)
    prompt, params = chat.lm.calls[-1]
    assert params.max_new_tokens == 128 - len(prompt)
    with pytest.raises(RequestError, match="over the"):
        chat.engine.reply([Message.of("user", "x" * 100_000)], trim_history=True)


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "empty"),
        ([{"role": "user", "content": " "}], {}, "message 1: the human turn is empty"),
        ([{"role": "user", "content": []}], {}, "message 1: the human turn is empty"),
        ([{"role": "bot", "content": "a"}], {}, "'bot'"),
        ([{"role": "user", "content": {"type": "audio", "audio": "no.wav"}}], {}, "no.wav"),
        ([Message.of("user", AudioPart("no.wav"))], {}, "no.wav does not exist"),
        ([Message.of("user", clip(0.05))], {}, "a sound lasts 0.050 s, too short"),
        (HELLO, {"seed": -1}, "seed -1"),
        (HELLO, {"seed": 2**31}, "seed"),
        (HELLO, {"seed": True}, "seed"),
        (HELLO, {"speed": 3}, "speed 3"),
        (HELLO, {"volume": 0}, "volume 0"),
        (HELLO, {"speaker": "Bob"}, "unknown speaker 'Bob'.*Ann"),
        (HELLO, {"clone": {"speaker": "x"}}, "prompt_text"),
        (HELLO, {"speaker": "Ann", "clone": {}}, "not both"),
        (HELLO, {"tools": [weather(), weather()]}, "different names"),
    ],
)
def test_what_is_refused_before_anything_is_generated(golden, messages, options, words):
    chat = Chat(golden)
    with pytest.raises(RequestError, match=words) as caught:
        chat.engine.reply(messages, **options)
    assert str(caught.value).count("\n") <= 1
    assert chat.lm.calls == [] and "lm" not in chat.loaded


def test_transcripts(golden):
    chat = Chat(golden, "good day", " bye ", batch_size=2)
    assert chat.engine.transcribe([clip(3), clip(1)], seed=2) == ["bye", "good day"]  # the shorter one runs first
    assert chat.prompt(0).startswith("<s><|BOT|>system\n请记录下你所听到的语音内容。<|EOT|><|BOT|>human\n<audio_8>")
    assert [params for _, params in chat.lm.calls] == [replace(ASR_SAMPLING, seed=2, stop_ids=(chat.vocab.eot,))] * 2
    assert ASR_SAMPLING.temperature == 0
    assert chat.loaded == ["tokenizer", "lm"]
    assert Chat(golden, "a").engine.transcribe(golden / "wavs" / "clip1_16k.wav") == "a"
    assert Chat(golden).engine.transcribe([]) == []


def test_transcripts_that_do_not_work_out(golden, caplog):
    with pytest.raises(RequestError, match="does not exist"):
        Chat(golden).engine.transcribe("no.wav")
    with pytest.raises(RequestError, match="too short"):
        Chat(golden).engine.transcribe(clip(0.1))
    with pytest.raises(RequestError, match="over the context of 64"):
        Chat(golden, max_context=64).engine.transcribe(clip(6))
    text = Chat(golden, "one two").engine.transcribe(clip(), sampling=replace(ASR_SAMPLING, max_new_tokens=2))
    assert text and "incomplete" in caplog.text


def test_options_that_are_refused(golden):
    with pytest.raises(RequestError, match="batch_size 0"):
        Chat(golden, batch_size=0)
