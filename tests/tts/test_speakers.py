import json

import numpy as np
import pytest
import torch

from cosyvoice.prompt import VoicePrompt
from stepaudio.tts.speakers import SpeakerPrompt, Speakers, VoiceStore, check_recording, identity_of
from tokenizer.audio import Audio, write_audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

RATE = 16_000


def noise(seconds, level=0.2, rate=RATE):
    return Audio(np.random.default_rng(0).uniform(-level, level, int(seconds * rate)).astype(np.float32), rate)


@pytest.fixture
def folder(tmp_path):
    names = {"Ann": "hello", "AnnRAP": "（RAP）yo", "Bob哼唱": "la", "Bob": "hi"}
    (tmp_path / "speakers_info.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    for name in names:
        write_audio(tmp_path / f"{name}_prompt.wav", noise(3))
    return tmp_path


def test_release_form(folder):
    speakers = Speakers.from_path(folder)
    assert speakers.names == ["Ann", "Bob"]
    assert (speakers.music_of("Ann"), speakers.music_of("Bob")) == (["RAP"], ["哼唱"])
    assert speakers.find(None) == SpeakerPrompt("Ann", "hello", folder / "Ann_prompt.wav")
    assert speakers.find("Ann", "RAP").prompt_text == "（RAP）yo"
    assert speakers.find("AnnRAP", "RAP").speaker == "AnnRAP"


def test_list_form_with_paths_relative_to_the_file(folder):
    rows = [{"speaker": "Cy", "prompt_text": "hey", "wav_path": "Ann_prompt.wav"}]
    (folder / "more.json").write_text(json.dumps(rows))
    assert Speakers.from_path(folder / "more.json").find("Cy").wav_path == folder / "Ann_prompt.wav"


@pytest.mark.parametrize(
    ("name", "music", "message"),
    [
        ("Anne", None, "did you mean 'Ann'.*known: Ann, AnnRAP"),
        ("x", None, "known: Ann"),
        ("Ann", "哼唱", "'Ann哼唱' with a recording of singing"),
        ("Bob", "RAP", "'BobRAP' with a recording of rap"),
    ],
)
def test_unknown_voices(folder, name, music, message):
    with pytest.raises(RequestError, match=message):
        Speakers.from_path(folder).find(name, music)


def test_no_speakers_at_all():
    with pytest.raises(RequestError, match="--speaker-json"):
        Speakers().find("Ann")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "must hold an object"),
        ('{"Zoe": "hi"}', "speaker 'Zoe'.*Zoe_prompt.wav does not exist"),
        ('{"Ann": ""}', "'prompt_text' is missing or empty"),
        ('{"Ann": 5}', "'prompt_text' is missing or empty"),
        ('[{"speaker": "Ann", "wav_path": "Ann_prompt.wav"}]', "'prompt_text' is missing"),
        ('[{"speaker": "Ann", "prompt_text": "x"}]', "'wav_path' is missing"),
        ('[{"prompt_text": "x", "wav_path": "Ann_prompt.wav"}]', "empty or given twice"),
        ("[5]", "entry 1 must be an object"),
    ],
)
def test_bad_files(folder, content, message):
    (folder / "speakers_info.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        Speakers.from_path(folder)


def test_missing_file(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        Speakers.from_path(tmp_path / "none.json")


class Maker:
    """Makes a prompt whose embedding says how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, audio):
        self.calls += 1
        return VoicePrompt(
            AudioCodes([1, 2, 1030, 1031, 1032]), torch.zeros(4, 80), torch.full((192,), float(self.calls))
        )


def test_prompts_are_made_once_per_content_and_models(folder, tmp_path):
    make, cache = Maker(), tmp_path / "cache" / "deep"
    store = VoiceStore(make, "models 1", cache)
    first = store.get(folder / "Ann_prompt.wav")
    assert store.get(folder / "Bob_prompt.wav") is first  # same bytes
    again = VoiceStore(make, "models 1", cache).get(folder / "Ann_prompt.wav")
    assert (make.calls, again.codes) == (1, first.codes)
    VoiceStore(make, "models 2", cache).get(folder / "Ann_prompt.wav")
    assert make.calls == 2
    write_audio(folder / "Ann_prompt.wav", noise(2))
    store.get(folder / "Ann_prompt.wav")
    assert make.calls == 3


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:50]), lambda path: path.write_bytes(b"")]
)
def test_a_damaged_cache_file_is_made_again(folder, tmp_path, damage):
    make, cache = Maker(), tmp_path / "cache"
    VoiceStore(make, "m", cache).get(folder / "Ann_prompt.wav")
    [path] = cache.iterdir()
    damage(path)
    VoiceStore(make, "m", cache).get(folder / "Ann_prompt.wav")
    VoiceStore(make, "m", cache).get(folder / "Ann_prompt.wav")
    assert make.calls == 2


def test_a_cache_that_cannot_be_written_only_warns(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    VoiceStore(Maker(), "m", tmp_path / "file" / "cache").get(folder / "Ann_prompt.wav")
    assert "not kept on disk" in caplog.text


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (noise(0.2), "lasts 0.20 s, a voice needs 0.5 to 60 s"),
        (noise(600, rate=8000), "lasts 600.00 s"),
        (Audio(np.zeros(3 * RATE, np.float32), RATE), "silent"),
        (noise(3, level=0.001), "silent"),
    ],
)
def test_recordings_that_cannot_serve(audio, message):
    with pytest.raises(RequestError, match=message):
        check_recording(audio)


@pytest.mark.parametrize(
    ("audio", "channels", "warning"),
    [
        (noise(3), 1, None),
        (noise(0.8), 1, "lasts 0.8 s"),
        (noise(35, rate=16000), 1, "lasts 35.0 s"),
        (Audio(np.clip(noise(3, 2).samples, -1, 1), RATE), 1, "clipped"),
        (noise(3, 0.01), 1, "very quiet"),
        (Audio(np.concatenate([noise(1).samples, np.zeros(5 * RATE, np.float32)]), RATE), 1, "mostly silence"),
        (noise(3, rate=8000), 1, "8000 Hz"),
        (noise(3), 2, "2 channels"),
    ],
)
def test_doubtful_recordings_are_named_with_their_remedy(audio, channels, warning):
    warnings = check_recording(audio, channels, "a.wav")
    assert len(warnings) == (warning is not None)
    assert warning is None or (warning in warnings[0] and ":" in warnings[0])


def test_identity_follows_the_files(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 200_000)
    before = identity_of([path, tmp_path / "missing"])
    assert before == identity_of([path])
    path.write_bytes(b"x" * 199_999 + b"y")
    assert identity_of([path]) != before
