"""Conversations: what is taken, what is refused and in which words."""

import numpy as np
import pytest
import torch

from stepaudio.chat.messages import AudioPart, CallPart, Message, TextPart, from_dicts, printable
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError


def one(content, role="user", **options):
    return from_dicts([{"role": role, "content": content}], **options)[0]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("hi", (TextPart("hi"),)),
        ({"type": "text", "text": "hi"}, (TextPart("hi"),)),
        ([{"type": "text", "text": "a"}, "b"], (TextPart("a"), TextPart("b"))),
        ([], ()),
        ({"type": "call", "call": '{"name": "x"}'}, (CallPart('{"name": "x"}'),)),
    ],
)
def test_text_forms(content, parts):
    assert one(content) == Message("human", parts)


def test_no_content_opens_a_turn():
    assert one(None, "assistant") == Message("assistant", open=True)


def test_sound_forms(golden):
    codes = AudioCodes([1, 2, 1024, 1025, 1026])
    clip = Audio(np.zeros(800, np.float32), 16_000)

    def sound(value, **more):
        return one({"type": "audio", "audio": value, **more}).parts[0]

    assert one({"type": "audio", "audio": "clip1_16k.wav"}, folder=golden / "wavs").parts[0].audio == (
        golden / "wavs" / "clip1_16k.wav"
    )
    assert sound(clip).audio is clip
    assert sound(codes).audio is codes
    assert sound(codes.to_text()).audio == codes
    for array in (np.zeros(800, np.float32), torch.zeros(1, 800)):
        audio = sound(array, sample_rate=16_000, transcript="nothing")
        assert (len(audio.audio), audio.audio.sample_rate, audio.transcript) == (800, 16_000, "nothing")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("hello", ["list", "'hello'"]),
        ([{"role": "user"}], ["message 1", "content"]),
        ([5], ["message 1", "5"]),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], ["message 2", "'robot'", "assistant"]),
        ([{"role": ["user"], "content": "b"}], ["message 1", "['user']"]),
        ([{"role": "user", "content": 5}], ["message 1", "5"]),
        ([{"role": "user", "content": {"type": "image", "image": "x.png"}}], ["'image'", "text, audio"]),
        ([{"role": "user", "content": {"type": "audio"}}], ["'audio'"]),
        ([{"role": "user", "content": {"type": "audio", "audio": "no.wav"}}], ["no.wav", "does not exist"]),
        ([{"role": "user", "content": {"type": "audio", "audio": 5}}], ["path", "5"]),
        ([{"role": "user", "content": {"type": "audio", "audio": np.zeros(9)}}], ["sample_rate"]),
        ([{"role": "user", "content": {"type": "text", "text": None}}], ["string", "NoneType"]),
        ([{"role": "user", "content": "a\ud800"}], ["surrogate", "U+D800", "position 1"]),
        ([{"role": "user", "content": "a\x07b"}], ["control", "U+0007"]),
    ],
)
def test_what_is_refused(rows, words):
    with pytest.raises(RequestError) as caught:
        from_dicts(rows)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") <= 1


def test_messages_of_contents_and_their_text():
    codes = AudioCodes([1, 2, 1024, 1025, 1026])
    message = Message.of("user", "see ", codes, "this", CallPart("{}"))
    assert (message.role, message.text, message.empty) == ("human", "see this", False)
    assert message.parts[1].audio is codes
    assert Message.of("user", " \n").empty and Message("human").empty
    assert not Message.of("user", AudioPart("x.wav")).empty
    with pytest.raises(RequestError, match="path"):
        AudioPart(None)


def test_printable_drops_control_characters_only():
    assert printable("a\x00b\n\tc\ud800é你\x9f") == "ab\n\tcé你"
