"""Code written for the original: its imports, constructors, calls and results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stepaudio
import tokenizer
from stepaudio.chat import engine as chat
from stepaudio.device import device_map_for, resolve_device
from stepaudio.lm.geometry import Geometry, read_config
from stepaudio.lm.hf_tokenizer import write_tokenizer_json
from stepaudio.tts import engine as tts
from tokenizer.audio import Audio, read_audio
from tokenizer.codes import AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import CheckpointError, RequestError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder(tiny):
    return tokenizer.StepAudioTokenizer(str(tiny / "Step-Audio-Tokenizer"))


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """The three checkpoints under other names in other places, as a download cache keeps them."""
    root = tmp_path_factory.mktemp("cache")
    found = {}
    for key, name in (("tokenizer", "Step-Audio-Tokenizer"), ("tts", "Step-Audio-TTS-3B"), ("chat", "Step-Audio-Chat")):
        (root / key).mkdir()
        found[key] = root / key / "0a1b2c"
        found[key].symlink_to(tiny / name, target_is_directory=True)
    return found


@pytest.fixture
def speaker(tiny):
    return next(iter(json.loads((tiny / "Step-Audio-TTS-3B" / "speakers" / "speakers_info.json").read_text())))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick(cache):
    """Options of the speech engine: one attempt at each piece, and voices that the next test finds again."""
    return {"max_attempts": 1, "cache_dir": cache}


def test_tokenizer_gives_a_string_and_ids(encoder, tiny, golden):
    clip = read_audio(golden / "wavs" / "clip1_16k.wav")
    wave = torch.from_numpy(clip.samples)[None]
    dual = DualTokenizer.from_dir(tiny / "Step-Audio-Tokenizer")
    assert encoder(wave, clip.sample_rate) == dual.encode(clip).to_text()
    ids, linguistic, semantic = encoder.wav2token(wave, clip.sample_rate)
    assert ids == dual.encode(clip, trim=True).to_ids()
    assert AudioCodes.merge(linguistic, semantic).to_ids() == ids
    assert all(type(code) is int for code in [*ids, *linguistic, *semantic])
    assert max(linguistic) < 1024 and max(semantic) < 4096
    untrimmed, _, _ = encoder.wav2token(wave, clip.sample_rate, enable_trim=False)
    assert untrimmed == dual.encode(clip).to_ids()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_tokenizer_takes_any_rate_channels_and_kind(encoder, rate):
    wave = 0.1 * torch.randn(2, rate, generator=torch.Generator().manual_seed(0))
    mono = encoder(wave.mean(0, keepdim=True), rate)
    assert encoder(wave, rate) == mono == encoder(wave.double().numpy(), rate)
    assert mono.count("<audio_") == 40


def test_tokenizer_refuses_what_is_no_sound(encoder):
    with pytest.raises(RequestError, match="shape"):
        encoder(torch.zeros(1, 1, 100), 16_000)
    with pytest.raises(RequestError, match="4000 Hz"):
        encoder(torch.zeros(1, 16_000), 4_000)
    with pytest.raises(CheckpointError, match="missing"):
        tokenizer.StepAudioTokenizer("/nowhere")


def test_speech_as_the_original_returns_it(folders, encoder, speaker, quick):
    engine = stepaudio.StepAudioTTS(str(folders["tts"]), encoder, **quick)
    assert isinstance(engine, tts.StepAudioTTS)
    wave, rate = engine("你好。", speaker)
    assert (wave.dtype, wave.ndim, wave.shape[0], rate) == (torch.float32, 2, 1, 22_050)
    same = engine.synthesize("你好。", speaker).audio
    assert np.array_equal(wave[0].numpy(), same.samples)
    with pytest.raises(RequestError, match=r"unknown speaker 'Nobody'.*known: "):
        engine("你好", "Nobody")


def test_clone_and_rap_take_the_place_of_the_speaker(folders, encoder, golden, quick):
    engine = stepaudio.StepAudioTTS(folders["tts"], encoder, **quick)
    clone = {"speaker": "me", "prompt_text": "hello", "wav_path": str(golden / "wavs" / "clip1_16k.wav")}
    wave, rate = engine("（RAP）你好", "", clone)
    expected = engine.synthesize("（RAP）你好", clone=clone).audio
    assert np.array_equal(wave[0].numpy(), expected.samples) and rate == expected.sample_rate


def test_encoder_may_be_a_folder_a_tokenizer_or_left_out(tiny, folders, encoder, speaker, quick, tmp_path):
    prompts = []
    for number, given in enumerate((encoder, encoder.dual, folders["tokenizer"], None)):
        folder = tiny / "Step-Audio-TTS-3B" if given is None else folders["tts"]
        engine = stepaudio.StepAudioTTS(folder, given, cache_dir=tmp_path / str(number))
        prompts.append(engine.voices.get(engine.speakers.find(speaker).wav_path))
    assert len({prompt.codes for prompt in prompts}) == 1 and len(prompts[0].codes)


def test_voices_of_the_current_folder(tiny, tmp_path, monkeypatch, encoder):
    """The release's model folder has no voices: its scripts are run where `speakers/` lies."""
    bare = tmp_path / "Step-Audio-TTS-3B"
    bare.mkdir()
    for path in (tiny / "Step-Audio-TTS-3B").iterdir():
        if path.name != "speakers":
            (bare / path.name).symlink_to(path)
    shutil.copytree(tiny / "Step-Audio-TTS-3B" / "speakers", tmp_path / "work" / "speakers")
    monkeypatch.chdir(tmp_path / "work")
    assert stepaudio.StepAudioTTS(bare, encoder).speakers.names


def test_chat_as_the_original_returns_it(folders, speaker, golden, quick):
    model = stepaudio.StepAudio(
        tokenizer_path=str(folders["tokenizer"]),
        tts_path=str(folders["tts"]),
        llm_path=str(folders["chat"]),
        tts_options=quick,
    )
    assert isinstance(model, chat.StepAudio)
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": {"type": "audio", "audio": str(golden / "wavs" / "clip1_16k.wav")}},
    ]
    text, wave, rate = model(messages, speaker, speed_ratio=1.25, volumn_ratio=1.5)
    reply = model.reply(messages, speaker=speaker, speed=1.25, volume=1.5)
    assert text == reply.text and "<|" not in text
    assert (wave.dtype, wave.shape[0], rate) == (torch.float32, 1, 22_050)
    assert np.array_equal(wave[0].numpy(), reply.audio.samples)


def test_an_answer_without_words_is_no_crash(folders):
    model = stepaudio.StepAudio(folders["tokenizer"], folders["tts"], folders["chat"])
    model.reply = lambda messages, **options: chat.Reply("", None, (), None, (), (), {})
    text, wave, rate = model([{"role": "user", "content": "x"}], None)
    assert (text, tuple(wave.shape), rate) == ("", (1, 0), 22_050)


def test_both_constructors_give_the_same_class(tiny):
    model = stepaudio.StepAudio.from_dir(tiny, text_only=True)
    assert type(model) is stepaudio.StepAudio
    assert model.transcribe(Audio(np.zeros(16_000, np.float32), 16_000)) is not None
    assert type(stepaudio.StepAudioTTS.from_dir(tiny)) is stepaudio.StepAudioTTS
    with pytest.raises(CheckpointError, match="Step-Audio-Chat is missing"):
        stepaudio.StepAudio.from_dir("/nowhere")
    with pytest.raises(CheckpointError, match="speech is missing"):
        stepaudio.StepAudio(tiny / "Step-Audio-Tokenizer", tiny / "speech", tiny / "Step-Audio-Chat")
    with pytest.raises(RequestError, match="--dtype 'int3' is unknown"):
        stepaudio.StepAudioTTS.from_dir(tiny, dtype="int3")


def test_unknown_names_are_attribute_errors():
    for package in (stepaudio, tokenizer):
        with pytest.raises(AttributeError, match="Nonsense"):
            package.Nonsense  # noqa: B018


AUTO = """
import sys
import stepaudio, tokenizer, tokenizer.errors, stepaudio.cli
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
import importlib.util
importlib.util.find_spec("transformers")  # a look must not use the hook up
from transformers import AutoModelForCausalLM, AutoTokenizer
vocab = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = vocab.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True, return_tensors="pt")
ids = ids["input_ids"] if hasattr(ids, "keys") else ids
out = model.generate(ids, max_new_tokens=3, do_sample=False)
print(type(model).__module__, out.shape[1] - ids.shape[1])
"""


def test_importing_stepaudio_is_quick_and_teaches_the_auto_classes(tiny, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny / "Step-Audio-Chat", folder)
    write_tokenizer_json(folder, folder)
    done = subprocess.run([sys.executable, "-c", AUTO, str(folder)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "stepaudio.lm.modeling"
    assert 1 <= int(done.stdout.split()[1]) <= 3


def test_auto_classes_learn_at_once_where_transformers_is_loaded():
    from transformers import CONFIG_MAPPING

    from stepaudio.auto import register_step1

    before = list(sys.meta_path)
    register_step1()
    assert sys.meta_path == before
    assert CONFIG_MAPPING["step1"].__module__ == "stepaudio.lm.modeling"


def test_entry_points_compute_in_full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    resolve_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_chat_model_too_large_for_its_device_is_spread(tiny, monkeypatch):
    folder, cuda = tiny / "Step-Audio-Chat", torch.device("cuda", 0)
    weights = 2 * Geometry.from_config(read_config(folder)).parameters
    for memory, expected in ((weights, "auto"), (2 * weights, None)):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert device_map_for(folder, cuda, torch.bfloat16) == expected
    assert device_map_for(folder, torch.device("cpu"), torch.bfloat16) is None
