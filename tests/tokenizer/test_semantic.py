import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tokenizer.audio import read_audio, resample
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.log_mel import log_mel
from tokenizer.onnx_export import write_semantic_onnx
from tokenizer.onnx_weights import read_semantic_onnx
from tokenizer.semantic import (
    OnnxBackend,
    SemanticConfig,
    SemanticEncoder,
    SemanticTokenizer,
    TorchBackend,
    sinusoids,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "semantic_tokenizer" / "speech_tokenizer_v1.onnx"
CONFIG = SemanticConfig(width=32, num_heads=2, num_layers=3, mlp_width=48, num_positions=800, codebook_size=64)


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return SemanticTokenizer.from_file(MODEL)


@pytest.fixture(scope="module")
def released():
    return SemanticTokenizer.from_file(MODEL, backend="onnx")


@pytest.fixture(scope="module")
def speech():
    clips = [read_audio(path) for path in sorted((GOLDEN / "wavs").glob("*.wav"))]
    return [resample(clip, 16_000).samples for clip in clips]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SemanticEncoder(CONFIG)


class Recorder:
    """A backend that gives 25 codes per second and keeps the shapes it was asked for."""

    def __init__(self, per_frame=4):
        self.batches, self.per_frame = [], per_frame

    def __call__(self, mel, lengths):
        self.batches.append((tuple(mel.shape), lengths.tolist()))
        return [np.full(-(-frames // self.per_frame), frames, np.int64) for frames in lengths.tolist()]


def test_sizes_are_read_out_of_the_graph(tokenizer):
    dims = json.loads((GOLDEN / "semantic_tokenizer" / "golden.json").read_text())["dims"]
    config = tokenizer.backend.model.config
    assert config == SemanticConfig(
        num_mels=dims["n_mels"],
        width=dims["n_audio_state"],
        num_heads=dims["n_audio_head"],
        num_layers=dims["n_audio_layer"],
        mlp_width=4 * dims["n_audio_state"],
        num_positions=dims["n_audio_ctx"],
        codebook_size=dims["n_codebook_size"],
        strides=(2, 2),
    )


def test_keys_and_shapes_at_release_size():
    manifest = json.loads((GOLDEN / "manifests" / "s3tokenizer_v1_25hz.json").read_text())
    manifest.pop("_meta")
    with torch.device("meta"):
        model = SemanticEncoder(SemanticConfig())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest


def test_positions_of_a_new_model_are_those_of_the_file(tokenizer):
    stored = tokenizer.backend.model.encoder.positional_embedding
    assert torch.equal(sinusoids(*stored.shape), stored)


def test_equals_onnxruntime(tokenizer, released, speech):
    clips = [*speech, *(np.resize(speech[1], n) for n in (480, 799, 800, 1120, 3_333, 16_001))]
    for ours, theirs in zip(tokenizer.encode(clips), released.encode(clips)):
        assert ours.dtype == np.int64
        assert np.array_equal(ours, theirs)


def test_batch_equals_one_by_one(tokenizer, speech):
    clips = [speech[0], speech[1][:5000], speech[2], speech[1], speech[0][:480], speech[0][:100], speech[1][:481_000]]
    single = [tokenizer.encode([clip])[0] for clip in clips]
    assert [len(codes) for codes in single] == [108, 8, 88, 105, 1, 0, 105]
    for batch, alone in zip(tokenizer.encode(clips), single):
        assert np.array_equal(batch, alone)
    assert tokenizer.encode([]) == []


def test_padding_has_no_influence_on_hidden_states(tokenizer, speech):
    model = tokenizer.backend.model
    mels = [log_mel(torch.from_numpy(clip)) for clip in (speech[0][:32_000], speech[1][:8_111], speech[2][:480])]
    padded = torch.full((3, 128, 230), 9.0)
    for row, mel in zip(padded, mels):
        row[:, : mel.shape[1]] = mel
    hidden, counts = model(padded, torch.tensor([mel.shape[1] for mel in mels]))
    assert counts.tolist() == [50, 13, 1]
    for row, mel, count in zip(hidden, mels, counts.tolist()):
        alone, none = model(mel[None])
        assert none is None and alone.shape[1] == count
        assert (row[:count] - alone[0]).abs().max() < 2e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 9, 100, 3000])
def test_count_by_frames(encoder, frames):
    expected = ((frames - 1) // 2) // 2 + 1
    hidden, counts = encoder(torch.zeros(1, 128, frames), torch.tensor([frames]))
    assert hidden.shape == (1, expected, CONFIG.width) and counts.tolist() == [expected]


def test_more_codes_than_positions(encoder):
    with pytest.raises(AssertionError, match="801 codes"):
        encoder(torch.zeros(1, 128, 3204))


@pytest.mark.parametrize(
    ("length", "windows"),
    [
        (0, []),
        (479, []),
        (480, [3]),
        (480_000, [3000]),
        (480_479, [3000]),
        (480_480, [3000, 3]),
        (1_000_000, [3000, 3000, 250]),
    ],
)
def test_windows(length, windows):
    backend = Recorder()
    codes = SemanticTokenizer(backend).encode([np.zeros(length, np.float32)])[0]
    assert sorted(frames for _, lengths in backend.batches for frames in lengths) == sorted(windows)
    expected = [np.full(-(-frames // 4), frames) for frames in windows]
    assert np.array_equal(codes, np.concatenate([np.zeros(0, np.int64), *expected]))


def test_batches_are_bounded_and_sorted():
    backend = Recorder()
    tokenizer = SemanticTokenizer(backend)
    tokenizer.batch_frames = 400
    seconds = [1, 3, 2, 1, 0.5, 4, 0.1, 6]
    codes = tokenizer.encode([np.zeros(int(16_000 * s), np.float32) for s in seconds])
    assert [len(row) for row in codes] == [25, 75, 50, 25, 13, 100, 3, 150]
    assert [lengths for _, lengths in backend.batches] == [[600], [400], [300], [200, 100], [100, 50, 10]]


def test_wrong_rate_is_refused():
    with pytest.raises(CheckpointError, match=r"gave 50 codes for 1.00 s, expected 25"):
        SemanticTokenizer(Recorder(per_frame=2)).encode([np.zeros(16_000, np.float32)])


def test_trains(encoder):
    mel = torch.randn(2, 128, 61)
    lengths = torch.tensor([61, 30])
    hidden, counts = encoder(mel, lengths)
    assert counts.tolist() == [16, 8]
    codes = encoder.quantize(hidden)
    target = encoder.quantizer.codebook[codes].detach()
    before = ((hidden - target) ** 2).mean()
    before.backward()
    missing = [name for name, value in encoder.named_parameters() if value.grad is None]
    assert missing == ["quantizer._codebook.embed"]
    with torch.no_grad():
        for value in encoder.parameters():
            if value.grad is not None:
                value -= 0.01 * value.grad
    assert ((encoder(mel, lengths)[0] - target) ** 2).mean() < before


def test_nearest_code_is_the_cosine_nearest():
    model = SemanticEncoder(CONFIG)
    with torch.no_grad():
        model.quantizer.codebook.mul_(1 + 0.1 * torch.rand(64, 1))
    hidden = torch.randn(5, 7, 32)
    distance = torch.cdist(torch.nn.functional.normalize(hidden, dim=-1), model.quantizer.codebook)
    assert torch.equal(model.quantize(hidden), distance.argmin(dim=-1))
    assert torch.equal(model.quantize(1000 * hidden), distance.argmin(dim=-1))


def test_exported_file_is_read_back(encoder, tmp_path):
    path = tmp_path / "speech_tokenizer_v1.onnx"
    write_semantic_onnx(path, encoder.state_dict(), CONFIG.num_heads)
    model = SemanticEncoder.from_file(path)
    assert model.config == CONFIG
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    clip = noise(32_000)
    ours, theirs = (SemanticTokenizer.from_file(path, backend=name).encode([clip])[0] for name in ("torch", "onnx"))
    assert np.array_equal(ours, theirs)
    assert np.array_equal(ours, SemanticTokenizer(TorchBackend(encoder.eval())).encode([clip])[0])


def changed(tmp_path, change):
    model = onnx.load(MODEL)
    change(model.graph)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    return path


def rename(graph, old, new):
    next(node for node in graph.node if node.name == old).name = new


def resize(graph, name, shape):
    stored = next(value for value in graph.initializer if value.name == name)
    stored.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))


def heads(graph, count):
    node = next(node for node in graph.node if node.name == "/blocks.0/attn/Constant_1")
    node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.asarray(count)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: rename(g, "/blocks.1/attn/query/MatMul", "/x"), "1 weights have no known place"),
        (lambda g: rename(g, "/conv2/Conv", "/x"), "node '/conv2/Conv' is missing"),
        (lambda g: rename(g, "/blocks.0/attn/Constant_1", "/x"), "node '/blocks.0/attn/Constant_1' is missing"),
        (lambda g: g.initializer.append(onnx.numpy_helper.from_array(np.ones(9, np.float32), "extra")), "'extra'"),
        (lambda g: resize(g, "encoders.blocks.1.mlp_ln.bias", 63), r"mlp_ln.bias has shape \(63,\).*\(64,\)"),
        (lambda g: resize(g, "encoders.conv2.weight", (64, 64, 5)), r"conv2.weight has shape \(64, 64, 5\)"),
        (lambda g: g.initializer.remove(next(v for v in g.initializer if v.name == "encoders.conv1.weight")), "conv1"),
        (lambda g: heads(g, 5), "width 64 does not split into 5 heads"),
    ],
)
def test_other_graphs_are_refused(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        SemanticEncoder.from_file(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"not a graph at all", "truncated or not|cannot be opened"),
        (MODEL.read_bytes()[:1_000_000], "truncated or not|cannot be opened"),
    ],
)
def test_damaged_files_are_refused(tmp_path, backend, content, message):
    path = tmp_path / "speech_tokenizer_v1.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SemanticTokenizer.from_file(path, backend=backend)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_another_model_is_refused(backend):
    with pytest.raises(CheckpointError, match=r"campplus\.onnx"):
        SemanticTokenizer.from_file(GOLDEN / "prompt_features" / "campplus.onnx", backend=backend)


def test_backend_and_device_names():
    with pytest.raises(RequestError, match="not 'tensorrt'"):
        SemanticTokenizer.from_file(MODEL, backend="tensorrt")
    with pytest.raises(RequestError, match="cannot run on mps"):
        OnnxBackend(MODEL, torch.device("mps"))


def test_weights_are_copies_in_pytorch_layout():
    file = read_semantic_onnx(MODEL)
    assert file.num_heads == 4 and file.strides == (2, 2)
    assert file.tensors["encoder.blocks.0.mlp.0.weight"].shape == (256, 64)
    assert file.tensors["encoder.positional_embedding"].shape == (1500, 64)
    assert all(value.is_contiguous() and value.dtype == torch.float32 for value in file.tensors.values())
