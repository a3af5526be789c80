"""Replies and transcripts on the tiny checkpoint: random weights, the real code path."""

from dataclasses import replace

import numpy as np
import pytest

import stepaudio.chat.engine as engine_module
from stepaudio.chat.engine import CHAT_SAMPLING, Reply, StepAudio
from stepaudio.chat.messages import AudioPart, Message
from stepaudio.chat.tools import Tool
from stepaudio.lm.base import StopReason
from stepaudio.tts.engine import StepAudioTTS
from tests.lm.fake import FakeLM
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError

SHORT = replace(CHAT_SAMPLING, max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    return StepAudio.from_dir(tiny, tts_options={"max_attempts": 1, "cache_dir": tmp_path_factory.mktemp("voices")})


def scripted(tiny, engine, *answers):
    """The tiny engine with a model that says what it is told to."""
    scripts = iter(answers)
    encode = engine.vocab.encode
    lm = FakeLM(lambda _: encode(next(scripts), allow_special=True, bos=False, prefix=False), 32_768)
    return StepAudio.from_dir(tiny, lm=lm, tts=engine.tts)


def test_text_only_never_opens_the_speech_model(tiny, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the speech model must not be loaded")

    monkeypatch.setattr(StepAudioTTS, "from_dir", refuse)
    monkeypatch.setattr(engine_module.DualTokenizer, "from_dir", refuse)
    chat = StepAudio.from_dir(tiny, text_only=True)
    reply = chat.reply([{"role": "user", "content": "hello"}], sampling=SHORT)
    assert reply.audio is None and reply.text


def test_text_then_its_own_sound_in_the_same_bytes_twice(engine):
    first = engine.reply([{"role": "user", "content": "你好"}], sampling=SHORT, seed=1, speaker="Tingting")
    again = engine.reply([{"role": "user", "content": "你好"}], sampling=SHORT, seed=1, speaker="Tingting")
    assert first.text == again.text
    assert first.audio.sample_rate == 22_050 and np.array_equal(first.audio.samples, again.audio.samples)
    second = engine.reply([Message.of("user", first.audio)], sampling=SHORT, text_only=True)
    assert second.text and isinstance(second.messages[0].parts[0].audio, AudioCodes)


def test_six_turns_with_sound(engine, golden):
    wav = golden / "wavs" / "clip1_16k.wav"
    messages = [Message.of("system", "Be kind.")]
    for i in range(6):
        sound = AudioPart(wav, "good day" if i < 3 else None)
        messages.append(Message.of("user", sound if i % 2 else "hello"))
        messages = list(engine.reply(messages, sampling=SHORT, text_only=True, seed=i).messages)
    assert [message.role for message in messages] == ["system", *["human", "assistant"] * 6]
    assert messages[4].role == "assistant" and messages[3].text == "good day"
    assert [isinstance(messages[i].parts[0], AudioPart) for i in (7, 11)] == [True, True]


def test_stream_ends_when_it_is_cancelled(engine):
    seen = []
    for item in engine.stream([{"role": "user", "content": "hi"}], text_only=True, cancelled=lambda: len(seen) > 1):
        seen.append(item)
    assert isinstance(seen[-1], Reply) and seen[-1].stop is StopReason.CANCELLED
    assert len(seen) <= 4


def test_transcripts_in_a_batch_are_those_of_single_calls(engine, golden):
    clips = [golden / "wavs" / "clip1_16k.wav", golden / "wavs" / "clip0_22k.wav"]
    both = engine.transcribe(clips, sampling=SHORT)
    assert both == [engine.transcribe(one, sampling=SHORT) for one in clips]
    assert all(both)


def test_a_tool_call_is_made_and_the_answer_spoken(tiny, engine):
    call = '<|CALL_START|>{"name": "add", "arguments": {"a": 2, "b": 3}}<|CALL_END|>'
    number = {"type": "integer"}
    schema = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    add = Tool("add", "Adds two numbers", schema, lambda a, b: a + b)
    reply = scripted(tiny, engine, call, "five").reply([{"role": "user", "content": "2 + 3?"}], tools=[add])
    assert [done.result for done in reply.calls] == ["5"]
    assert reply.text == "five" and isinstance(reply.audio, Audio)


def test_direct_speech(tiny, engine):
    codes = AudioCodes.merge(range(20), range(30))
    reply = scripted(tiny, engine, codes.to_text()).reply([{"role": "user", "content": "sing"}])
    assert reply.text == "" and reply.messages[-1].parts[0].audio == codes
    assert len(reply.audio) == 256 * int(50 / (5 / 0.12) * 22_050 / 256)


def test_folders_that_are_not_there(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="Step-Audio-Chat"):
        StepAudio.from_dir(tmp_path)
    (tmp_path / "Step-Audio-Chat").symlink_to(tiny / "Step-Audio-Chat")
    with pytest.raises(CheckpointError, match="Step-Audio-TTS-3B"):
        StepAudio.from_dir(tmp_path)
    chat = StepAudio.from_dir(tmp_path, text_only=True)
    assert chat.reply([{"role": "user", "content": "hi"}], sampling=SHORT).text
    with pytest.raises(CheckpointError, match="Step-Audio-Tokenizer"):
        chat.reply([Message.of("user", Audio(np.zeros(16_000, np.float32), 16_000))])
