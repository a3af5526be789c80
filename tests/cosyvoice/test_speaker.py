from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchaudio
from onnx import TensorProto, helper
from safetensors.torch import load_file

from cosyvoice.speaker import SpeakerEncoder, speaker_features
from tokenizer.audio import Audio, read_audio, resample
from tokenizer.errors import CheckpointError, RequestError

GOLDEN = Path(__file__).parents[1] / "golden"
CAMPPLUS = GOLDEN / "prompt_features" / "campplus.onnx"
CLIPS = ["clip0_22k", "clip1_16k", "clip2_48k_stereo"]


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder.from_file(CAMPPLUS, threads=1)


def mean_over_time(path, input_name="any", output_name="thing", width=80, dims=3):
    """A model file whose embedding is the mean of its frames, under names of its own."""
    shape = ["B", "T", width][-dims:]
    node = helper.make_node("ReduceMean", [input_name], [output_name], axes=[1], keepdims=0)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("clip", CLIPS)
def test_recorded_embeddings(clip, encoder):
    golden = load_file(GOLDEN / "prompt_features" / "golden.safetensors")
    embedding = encoder.embed(read_audio(GOLDEN / "wavs" / f"{clip}.wav"))
    assert embedding.dtype == torch.float32
    assert torch.allclose(embedding, golden[f"{clip}.embedding"], atol=2e-3)


def test_features_are_kaldi_fbanks_without_their_mean():
    samples = torch.from_numpy(resample(read_audio(GOLDEN / "wavs" / "clip1_16k.wav"), 16_000).samples)
    fbank = torchaudio.compliance.kaldi.fbank(samples[None], num_mel_bins=80, dither=0.0, sample_frequency=16_000)
    assert torch.allclose(speaker_features(samples), fbank - fbank.mean(dim=0), atol=2e-3)


def test_tensors_are_found_by_position(tmp_path):
    encoder = SpeakerEncoder.from_file(mean_over_time(tmp_path / "m.onnx"))
    embedding = encoder.embed(Audio(np.random.default_rng(0).normal(0, 0.1, 8000), 16_000))
    assert embedding.shape == (80,)
    assert embedding.abs().max() < 1e-4  # the mean was taken away


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_shortest_clip(rate, encoder):
    noise = np.random.default_rng(0).normal(0, 0.1, rate).astype(np.float32)
    assert encoder.embed(Audio(noise[: rate // 10], rate)).isfinite().all()
    for count in (0, 1, rate // 10 - 1):
        with pytest.raises(RequestError, match="too short"):
            encoder.embed(Audio(noise[:count], rate))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"no model at all", "damaged or no ONNX model"),
        (CAMPPLUS.read_bytes()[:100_000], "damaged or no ONNX model"),
    ],
    ids=["empty", "pointer", "text", "truncated"],
)
def test_a_bad_file_is_refused(content, message, tmp_path):
    (tmp_path / "campplus.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SpeakerEncoder.from_file(tmp_path / "campplus.onnx")


@pytest.mark.parametrize("shape", [{"width": 40}, {"dims": 2}])
def test_a_model_of_another_kind_is_refused(shape, tmp_path):
    with pytest.raises(CheckpointError, match=r"must take one input \[B, T, 80\]"):
        SpeakerEncoder.from_file(mean_over_time(tmp_path / "m.onnx", **shape))
