from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosyvoice.config import MelConfig
from cosyvoice.mel import mel_spectrogram
from cosyvoice.prompt import VoicePrompt
from tokenizer.audio import Audio, read_audio, resample
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError, RequestError

CLIP = Path(__file__).parents[1] / "golden" / "wavs" / "clip2_48k_stereo.wav"
CODES = AudioCodes([5, 9, 1030, 4000, 5119])


class FakeTokenizer:
    def __init__(self, codes=CODES):
        self.codes, self.calls = codes, []

    def encode(self, audio, **options):
        self.calls.append(options)
        return self.codes


class FakeEncoder:
    def embed(self, audio):
        return torch.full((192,), audio.seconds)


def prompt():
    generator = torch.Generator().manual_seed(0)
    return VoicePrompt(CODES, torch.randn(7, 80, generator=generator), torch.randn(192, generator=generator))


def test_codes_come_from_the_trimmed_clip_and_mel_from_the_whole_one():
    audio, tokenizer = read_audio(CLIP), FakeTokenizer()
    made = VoicePrompt.from_audio(audio, tokenizer, FakeEncoder(), MelConfig(), dither=0.0, seed=4)
    assert tokenizer.calls == [{"trim": True, "dither": 0.0, "seed": 4}]
    whole = torch.from_numpy(resample(audio, 22_050).samples)
    assert made.codes == CODES
    assert torch.equal(made.mel, mel_spectrogram(whole, MelConfig()))
    assert torch.equal(made.embedding, torch.full((192,), audio.seconds))


def test_a_clip_without_codes_is_refused():
    audio = Audio(np.zeros(800, np.float32), 16_000)
    with pytest.raises(RequestError, match=r"0\.05 s is too short for a voice prompt"):
        VoicePrompt.from_audio(audio, FakeTokenizer(AudioCodes([])), FakeEncoder(), MelConfig())


def test_save_and_load_keep_every_bit(tmp_path):
    saved = prompt()
    path = saved.save(tmp_path / "voice.safetensors")
    loaded = VoicePrompt.load(path)
    assert loaded.codes == saved.codes
    assert torch.equal(loaded.mel, saved.mel)
    assert torch.equal(loaded.embedding, saved.embedding)
    assert [file.name for file in tmp_path.iterdir()] == ["voice.safetensors"]


def test_an_embedding_alone_is_a_prompt(tmp_path):
    path = VoicePrompt(AudioCodes([]), torch.zeros(0, 80), torch.ones(192)).save(tmp_path / "v.safetensors")
    assert VoicePrompt.load(path).mel.shape == (0, 80)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mel": torch.zeros(80)}, "mel must be a float tensor of 2 dimensions"),
        ({"embedding": torch.zeros(1, 192)}, "embedding must be a float tensor of 1 dimensions"),
        ({"embedding": torch.zeros(192, dtype=torch.long)}, "embedding must be a float tensor"),
        ({"mel": torch.full((2, 80), float("nan"))}, "mel holds NaN"),
        ({"mel": torch.zeros(0, 80)}, "5 codes but 0 mel frames"),
        ({"codes": AudioCodes([])}, "0 codes but 7 mel frames"),
    ],
)
def test_parts_that_make_no_prompt_are_refused(changes, message):
    good = prompt()
    parts = {"codes": good.codes, "mel": good.mel, "embedding": good.embedding} | changes
    with pytest.raises(RequestError, match=message):
        VoicePrompt(**parts)


def test_files_that_are_no_prompt_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    whole = prompt().save(tmp_path / "good.safetensors").read_bytes()
    tensors = {"codes": torch.zeros(5, dtype=torch.long), "mel": torch.zeros(7, 80), "embedding": torch.zeros(192)}
    header = {"format": "step-audio-voice-prompt", "version": "1"}

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            VoicePrompt.load(path)

    refused("missing")
    for content in (b"some text", whole[:-1], whole[:100], whole[:4]):
        path.write_bytes(content)
        refused("truncated or not safetensors")
    save_file(tensors, path)
    refused("not a voice prompt")
    save_file(tensors | {"more": torch.zeros(1)}, path, metadata=header)
    refused("not a voice prompt")
    save_file(tensors, path, metadata=header | {"version": "2"})
    refused("version 2, this reads 1")
    save_file(tensors | {"codes": torch.full((5,), 5120)}, path, metadata=header)
    refused("audio code 5120")
    save_file(tensors | {"mel": torch.zeros(7)}, path, metadata=header)
    refused("mel must be a float tensor")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        prompt().save(tmp_path / "no" / "voice.safetensors")
