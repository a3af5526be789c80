import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import HiFTConfig, read_config
from cosyvoice.hift import HarmonicSource, HiFTVocoder, SourceDraws, SourceStft
from cosyvoice.weight_norm import fuse_weight_norm, split_weight_norm
from tokenizer.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
HIFT = GOLDEN / "vocoder" / "hift.safetensors"


@pytest.fixture(scope="module")
def config():
    return read_config(GOLDEN / "flow").hift


@pytest.fixture(scope="module")
def release():
    return load_file(HIFT)


@pytest.fixture(scope="module")
def vocoder(config):
    return HiFTVocoder.from_file(HIFT, config)


@pytest.fixture(scope="module")
def mels():
    inputs = load_file(GOLDEN / "vocoder" / "inputs.safetensors")
    return [inputs[f"case{i}.mel"] for i in range(3)]


def draw(config, mel, seed=0):
    return SourceDraws.draw(config, mel.shape[1], torch.Generator().manual_seed(seed))


def pad(mels):
    longest = max(mel.shape[1] for mel in mels)
    return torch.stack([torch.nn.functional.pad(mel, (0, longest - mel.shape[1]), value=7.0) for mel in mels])


def test_full_size_keys_and_shapes_equal_the_manifest():
    manifest = json.loads((GOLDEN / "manifests" / "hift.json").read_text())
    meta = manifest.pop("_meta")
    with torch.device("meta"):
        state = HiFTVocoder(read_config(GOLDEN / "manifests" / "cosyvoice_full.yaml").hift).state_dict()
    split = split_weight_norm(state)
    assert {name: list(value.shape) for name, value in split.items()} == manifest
    assert sum(value.numel() for value in split.values()) == meta["n_elements"]


@pytest.mark.parametrize(
    "restyle",
    [
        lambda state: {f"generator.{name}": value for name, value in state.items()},
        lambda state: {
            name.replace("weight_g", "parametrizations.weight.original0").replace(
                "weight_v", "parametrizations.weight.original1"
            ): value
            for name, value in state.items()
        },
        lambda state: fuse_weight_norm(state, "test"),
        lambda state: {"state_dict": state},
    ],
    ids=["generator prefix", "parametrizations", "fused", "wrapped"],
)
def test_every_key_style_loads_to_the_same_weights(restyle, release, vocoder, config, tmp_path):
    torch.save(restyle(release), tmp_path / "hift.pt")
    loaded = HiFTVocoder.from_file(tmp_path / "hift.pt", config).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in vocoder.state_dict().items())


def test_fused_weights_follow_the_formula(release, vocoder):
    g, v = release["ups.0.weight_g"], release["ups.0.weight_v"]
    expected = g * v / v.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
    assert torch.allclose(vocoder.ups[0].weight, expected, atol=1e-7)


def test_split_weight_norm_gives_release_keys_and_fuses_back_exactly(release, vocoder):
    state = vocoder.state_dict()
    split = split_weight_norm(state)
    assert {name: value.shape for name, value in split.items()} == {name: v.shape for name, v in release.items()}
    fused = fuse_weight_norm(split, "test")
    assert fused.keys() == state.keys()
    assert all(torch.equal(fused[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_pre.bias"), "conv_pre.bias"),
        (lambda state: state.pop("conv_pre.weight_v"), "conv_pre.weight_g"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({"conv_pre.weight_g": torch.zeros(3, 1, 1)}), r"weight_g has shape \(3, 1, 1\)"),
        (lambda state: state.update({"conv_post.bias": torch.zeros(7)}), r"conv_post.bias has shape \(7,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message, release, config, tmp_path):
    state = dict(release)
    change(state)
    torch.save(state, tmp_path / "hift.pt")
    with pytest.raises(CheckpointError, match=message):
        HiFTVocoder.from_file(tmp_path / "hift.pt", config)


@pytest.mark.parametrize("count", [256, 512, 2560])
def test_stft_and_its_inverse_equal_torch(count):
    stft = SourceStft(16, 4)
    wave = torch.randn(2, count)
    expected = torch.stft(wave, 16, 4, 16, torch.hann_window(16), return_complex=True)
    actual = stft(wave)
    assert torch.allclose(actual, torch.cat([expected.real, expected.imag], dim=1), atol=2e-6)
    noisy = actual + 0.1 * torch.randn_like(actual)
    inverse = torch.istft(torch.complex(noisy[:, :9], noisy[:, 9:]), 16, 4, 16, torch.hann_window(16))
    assert torch.allclose(stft.inverse(noisy), inverse, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 2, 3, 17])
def test_one_frame_becomes_256_samples(frames, vocoder, config):
    mel = torch.randn(1, 80, frames)
    with torch.inference_mode():
        result = vocoder(mel, draw(config, mel[0]))
    assert result.wav.shape == result.source.shape == (1, 256 * frames)
    assert result.f0.shape == (1, frames)
    assert result.wav.isfinite().all()
    assert result.wav.abs().max() <= config.audio_limit


def test_the_clamp_is_reached_and_kept(vocoder, config, mels):
    with torch.inference_mode():
        wav = vocoder(mels[2][None], draw(config, mels[2])).wav
    assert wav.abs().max().item() == pytest.approx(config.audio_limit, abs=1e-7)


def test_a_padded_batch_equals_one_by_one(vocoder, config, mels):
    """The padding holds garbage; f0 is passed on, because its rounding is integrated into the phase."""
    draws = [draw(config, mel, seed) for seed, mel in enumerate(mels)]
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    with torch.inference_mode():
        singles = [vocoder(mel[None], one) for mel, one in zip(mels, draws)]
        batch_f0 = vocoder(pad(mels), SourceDraws.batch(draws), lengths).f0
        f0 = pad([single.f0 for single in singles])[:, 0]
        batch = vocoder(pad(mels), SourceDraws.batch(draws), lengths, f0=f0)
    for i, (single, frames) in enumerate(zip(singles, lengths.tolist())):
        samples = 256 * frames
        assert torch.allclose(batch_f0[i, :frames], single.f0[0], atol=1e-3)
        assert torch.allclose(batch.source[i, :samples], single.source[0], atol=1e-6)
        assert torch.allclose(batch.wav[i, :samples], single.wav[0], atol=1e-4)
        assert not batch_f0[i, frames:].any()
        assert not batch.source[i, samples:].any()
        assert not batch.wav[i, samples:].any()


def test_lengths_without_padding_change_nothing(vocoder, config, mels):
    mel, draws = mels[0][None], draw(config, mels[0])
    with torch.inference_mode():
        free = vocoder(mel, draws)
        masked = vocoder(mel, draws, torch.tensor([mel.shape[2]]), f0=free.f0)
    assert torch.allclose(free.wav, masked.wav, atol=1e-5)


def test_draws_come_from_the_generator_alone(config):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (SourceDraws.draw(config, 5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.phases, again.phases)
    assert not torch.equal(first.noise, other.noise)
    assert first.phases.shape == (1, 9)
    assert first.noise.shape == (1, 1, 5 * 256)
    assert first.phases.abs().max() <= math.pi
    assert abs(first.noise.std().item() - 1) < 0.05


@pytest.mark.parametrize("order", [1, 2, 9])
def test_each_sine_is_a_multiple_of_f0_and_does_not_drift_in_30_seconds(order):
    config = HiFTConfig(nsf_sigma=0.0)
    source = HarmonicSource(config)
    with torch.no_grad():
        source.l_linear.weight.zero_()[0, order - 1] = 1.0
        source.l_linear.bias.zero_()
    frames, f0 = 2584, 200.0
    phases = torch.full((1, 9), 0.5)
    with torch.inference_mode():
        wave = source(torch.full((1, frames), f0), SourceDraws(phases, torch.randn(1, 9, frames * 256)))[0]
    time = torch.arange(1, frames * 256 + 1, dtype=torch.float64) / 22050
    phase = 0.0 if order == 1 else 0.5
    expected = torch.tanh(0.1 * torch.sin(2 * math.pi * (f0 * order) * time + phase))
    assert (wave[-22050:] - expected[-22050:]).abs().max() < 3e-3


def test_unvoiced_frames_carry_noise_only(config):
    source = HarmonicSource(config)
    noise = torch.randn(1, 9, 4 * 256)
    phases = torch.rand(1, 9)
    with torch.inference_mode():
        quiet = source(torch.full((1, 4), 9.0), SourceDraws(phases, noise))
        expected = torch.tanh(source.l_linear((noise * config.nsf_alpha / 3).transpose(1, 2)))[..., 0]
    assert torch.allclose(quiet, expected, atol=1e-7)


def test_gradients_reach_every_weight(config):
    torch.manual_seed(0)
    small = replace(config, base_channels=16, f0_cond_channels=8)
    vocoder = HiFTVocoder(small)
    mel = torch.randn(2, 80, 6)
    draws = SourceDraws.batch([draw(small, mel[0], seed) for seed in range(2)])
    result = vocoder(mel, draws, torch.tensor([6, 4]))
    (result.wav.square().mean() + result.f0.mean()).backward()
    without = [name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert vocoder.m_source.l_linear.weight.grad.abs().sum() > 0


def test_the_wave_sends_no_gradient_into_f0(config):
    small = replace(config, base_channels=16, f0_cond_channels=8)
    vocoder = HiFTVocoder(small)
    mel = torch.randn(1, 80, 4)
    vocoder(mel, draw(small, mel[0])).wav.sum().backward()
    assert all(p.grad is None for p in vocoder.f0_predictor.parameters())
