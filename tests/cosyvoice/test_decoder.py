import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.decoder import DecoderNoise, SpeechDecoder
from cosyvoice.hift import SourceDraws
from cosyvoice.prompt import VoicePrompt
from tokenizer.audio import Audio, read_audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError, RequestError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release-style decoder folder of the recorded tiny weights, without the speaker encoder."""
    folder = tmp_path_factory.mktemp("CosyVoice-300M-25Hz")
    shutil.copy(GOLDEN / "flow" / "cosyvoice.yaml", folder)
    torch.save(load_file(GOLDEN / "flow" / "flow.safetensors"), folder / "flow.pt")
    torch.save(load_file(GOLDEN / "vocoder" / "hift.safetensors"), folder / "hift.pt")
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    return SpeechDecoder.from_dir(folder)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [
        VoicePrompt(codes(size, 8), torch.randn(frames, 80, generator=generator), torch.randn(192, generator=generator))
        for size, frames in ((10, 25), (25, 40))
    ]


def codes(count, seed=0):
    """`count` codes in the 2:3 pattern."""
    rng = np.random.default_rng(seed)
    linguistic = np.arange(count) % 5 < 2
    return AudioCodes(np.where(linguistic, rng.integers(0, 1024, count), rng.integers(1024, 5120, count)))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 270])
def test_length_is_the_formula_to_the_sample(count, decoder, prompts):
    audio = decoder.decode(codes(count), prompts[0], num_steps=1)
    assert len(audio) == 256 * int(count / 41.667 * 22050 / 256)
    assert audio.sample_rate == decoder.sample_rate == 22_050
    assert np.abs(audio.samples).max() <= 0.99


def test_a_list_equals_one_by_one(decoder, prompts):
    items = [codes(30), codes(11, 1), codes(30, 2), codes(5, 3)]
    voices = [prompts[0], prompts[1], None, prompts[0]]
    seeds = [7, 8, 9, 7]
    noise = [decoder.draw_noise(*item) for item in zip(items, voices, seeds)]
    with torch.inference_mode():
        together = decoder.token_to_mel(items, voices, noise, num_steps=3)
    sounds = decoder.mel_to_audio(together, [one.source for one in noise])
    batch = decoder.decode(items, voices, seeds, num_steps=3)
    for item, voice, seed, one, mel, sound, whole in zip(items, voices, seeds, noise, together, sounds, batch):
        (alone,) = decoder.token_to_mel([item], [voice], [one], num_steps=3)
        assert torch.allclose(mel, alone, atol=1e-4)
        assert np.abs(sound.samples - decoder.mel_to_audio([mel], [one.source])[0].samples).max() < 2e-2
        single = decoder.decode(item, voice, seed, num_steps=3)
        assert len(single) == len(whole)
        assert np.corrcoef(single.samples, whole.samples)[0, 1] > 0.99


def test_order_and_grouping_of_a_long_list(decoder, prompts, monkeypatch):
    items = [codes(5 * (1 + i % 4), i) for i in range(9)]
    monkeypatch.setattr("cosyvoice.decoder._BATCH_FRAMES", 120)
    grouped = decoder.decode(items, prompts[0], list(range(9)), num_steps=1)
    for i, (item, audio) in enumerate(zip(items, grouped)):
        alone = decoder.decode(item, prompts[0], i, num_steps=1)
        assert len(audio) == len(alone)
        assert np.corrcoef(audio.samples, alone.samples)[0, 1] > 0.99


def test_same_seed_same_sound_and_the_global_generator_is_left_alone(decoder, prompts):
    state = torch.get_rng_state()
    first, again, other = (decoder.decode(codes(20), prompts[0], seed, 2).samples for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert torch.equal(torch.get_rng_state(), state)


def test_injected_noise_replaces_the_seed(decoder, prompts):
    item, voice = codes(20), prompts[0]
    noise = decoder.draw_noise(item, voice, 5)
    assert noise.flow.shape == (80, 25 + 41)
    assert noise.source.noise.shape == (1, 1, 41 * 256)
    expected = decoder.decode(item, voice, 5, 2).samples
    assert np.array_equal(decoder.decode(item, voice, 0, 2, noise).samples, expected)
    zero = DecoderNoise(torch.zeros_like(noise.flow), noise.source)
    assert not np.array_equal(decoder.decode(item, voice, 5, 2, zero).samples, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda noise: replace(noise, flow=noise.flow[:, 1:]), "noise has shape"),
        (
            lambda noise: replace(noise, source=SourceDraws(noise.source.phases[:, 1:], noise.source.noise)),
            "source noise has the shapes",
        ),
        (
            lambda noise: replace(noise, source=SourceDraws(noise.source.phases, noise.source.noise[..., 1:])),
            "source noise has the shapes",
        ),
    ],
)
def test_noise_of_a_wrong_shape_is_refused(change, message, decoder, prompts):
    noise = change(decoder.draw_noise(codes(20), prompts[0], 5))
    with pytest.raises(RequestError, match=message):
        decoder.decode(codes(20), prompts[0], noise=noise, num_steps=1)


def test_without_a_prompt(decoder):
    assert len(decoder.decode(codes(10), None, num_steps=1)) == 20 * 256


def test_bfloat16_is_the_flow_only(folder, prompts):
    decoder = SpeechDecoder.from_dir(folder, dtype=torch.bfloat16)
    noise = decoder.draw_noise(codes(10), prompts[0], 0)
    (mel,) = decoder.token_to_mel([codes(10)], [prompts[0]], [noise], num_steps=2)
    assert mel.dtype == torch.bfloat16
    assert decoder.vocoder.conv_pre.weight.dtype == torch.float32
    assert decoder.mel_to_audio([mel], [noise.source])[0].samples.dtype == np.float32


def test_stages_are_timed(decoder, prompts):
    timings = {"flow": 1.0}
    decoder.decode(codes(5), prompts[0], num_steps=1, timings=timings)
    assert timings["flow"] > 1.0
    assert timings["vocoder"] > 0.0


def test_a_broken_pattern_is_decoded_with_one_warning(decoder, prompts, caplog):
    broken = AudioCodes([1, 2, 3, 1030, 1040, 1050])
    with caplog.at_level(logging.WARNING):
        sounds = decoder.decode([codes(5), broken], prompts[0], num_steps=1)
    assert [record.getMessage().split(" breaks")[0] for record in caplog.records] == [
        "item 1: audio code 3 at position 2"
    ]
    assert len(sounds[1]) == 12 * 256


def test_bad_requests(decoder, prompts):
    empty = AudioCodes([])
    with pytest.raises(RequestError, match="the list of audio codes is empty"):
        decoder.decode(empty, prompts[0])
    with pytest.raises(RequestError, match="item 1: nothing to decode"):
        decoder.decode([codes(5), empty], prompts[0])
    with pytest.raises(RequestError, match="2 items but 1 prompts"):
        decoder.decode([codes(5), codes(5)], prompts[:1])
    with pytest.raises(RequestError, match="2 items but 3 seeds"):
        decoder.decode([codes(5), codes(5)], None, [1, 2, 3])
    with pytest.raises(RequestError, match="speaker embedding"):
        decoder.decode(codes(5), VoicePrompt(empty, torch.zeros(0, 80), torch.zeros(7)))
    assert decoder.decode([], prompts[0]) == []


def test_the_speaker_encoder_is_opened_by_the_first_voice_prompt(folder, tmp_path):
    class FakeTokenizer:
        def encode(self, audio, **options):
            return codes(5)

    own = shutil.copytree(folder, tmp_path / "own")
    decoder = SpeechDecoder.from_dir(own)
    audio = read_audio(GOLDEN / "wavs" / "clip1_16k.wav")
    with pytest.raises(CheckpointError, match=r"campplus\.onnx is missing"):
        decoder.voice_prompt(audio, FakeTokenizer())
    shutil.copy(GOLDEN / "prompt_features" / "campplus.onnx", own)
    prompt = decoder.voice_prompt(audio, FakeTokenizer())
    assert prompt.mel.shape == (361, 80)
    assert prompt.embedding.shape == (192,)
    assert decoder.speaker_encoder is decoder.speaker_encoder
    with pytest.raises(RequestError, match="too short"):
        decoder.voice_prompt(Audio(np.zeros(160, np.float32), 16_000), FakeTokenizer())


@pytest.mark.parametrize("name", ["cosyvoice.yaml", "flow.pt", "hift.pt"])
def test_a_missing_or_cut_file_is_named(name, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    whole = (own / name).read_bytes()
    if name.endswith(".pt"):
        (own / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=name):
            SpeechDecoder.from_dir(own)
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        SpeechDecoder.from_dir(own)
