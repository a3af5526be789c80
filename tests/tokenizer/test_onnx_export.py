"""The semantic tokenizer writer against plain torch and against the golden file's own weights."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from tokenizer.onnx_export import write_semantic_onnx

GOLDEN = Path(__file__).parents[1] / "golden" / "semantic_tokenizer" / "speech_tokenizer_v1.onnx"


def random_tensors(width, blocks, codes, mels=128, positions=200, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    tensors = {
        "encoder.conv1.weight": draw(width, mels, 3, scale=0.05),
        "encoder.conv1.bias": draw(width, scale=0.1),
        "encoder.conv2.weight": draw(width, width, 3, scale=0.1),
        "encoder.conv2.bias": draw(width, scale=0.1),
        "encoder.positional_embedding": draw(positions, width),
        "quantizer._codebook.embed": F.normalize(draw(codes, width), dim=-1),
    }
    shapes = {
        "attn.query": (width, width),
        "attn.key": (width, width),
        "attn.value": (width, width),
        "attn.out": (width, width),
        "mlp.0": (4 * width, width),
        "mlp.2": (width, 4 * width),
    }
    for i in range(blocks):
        for name, shape in shapes.items():
            tensors[f"encoder.blocks.{i}.{name}.weight"] = draw(*shape, scale=shape[1] ** -0.5)
            if name != "attn.key":
                tensors[f"encoder.blocks.{i}.{name}.bias"] = draw(shape[0], scale=0.1)
        for name in ("attn_ln", "mlp_ln"):
            tensors[f"encoder.blocks.{i}.{name}.weight"] = 1 + draw(width, scale=0.1)
            tensors[f"encoder.blocks.{i}.{name}.bias"] = draw(width, scale=0.1)
    return tensors


def torch_codes(tensors, heads, feats, length):
    """(codes, gap to the second best codeword) of the first `length` frames; nothing is padded."""
    x = feats[:, :, :length]
    for name in ("conv1", "conv2"):
        x = F.gelu(F.conv1d(x, tensors[f"encoder.{name}.weight"], tensors[f"encoder.{name}.bias"], stride=2, padding=1))
    x = x.transpose(1, 2) + tensors["encoder.positional_embedding"][: x.shape[2]]
    width = x.shape[2]
    blocks = sum(name.endswith("attn_ln.bias") for name in tensors)
    for i in range(blocks):
        part = {n.removeprefix(f"encoder.blocks.{i}."): t for n, t in tensors.items()}
        y = F.layer_norm(x, (width,), part["attn_ln.weight"], part["attn_ln.bias"])
        q, k, v = (
            F.linear(y, part[f"attn.{n}.weight"], part.get(f"attn.{n}.bias"))
            .view(1, -1, heads, width // heads)
            .transpose(1, 2)
            for n in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, width)
        x = x + F.linear(y, part["attn.out.weight"], part["attn.out.bias"])
        y = F.layer_norm(x, (width,), part["mlp_ln.weight"], part["mlp_ln.bias"])
        y = F.gelu(F.linear(y, part["mlp.0.weight"], part["mlp.0.bias"]))
        x = x + F.linear(y, part["mlp.2.weight"], part["mlp.2.bias"])
    scores = -torch.cdist(F.normalize(x[0], dim=-1), tensors["quantizer._codebook.embed"])
    best = scores.topk(2).values
    return scores.argmax(-1).numpy(), (best[:, 0] - best[:, 1]).numpy()


def by_release_rule(path):
    """Torch tensors of a file, found the way S3Tokenizer finds them (formats.md 6.4)."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {}
    for node in graph.node:
        for name in node.input:
            if name not in arrays:
                continue
            array = torch.from_numpy(arrays[name].copy())
            if name.startswith(("encoders.conv", "encoders.pos")):
                tensors[name.replace("encoders", "encoder", 1)] = array
            elif "quantizer" in node.name:
                if node.name.endswith("/Pow_1"):
                    tensors["quantizer._codebook.embed"] = array.t()
            else:
                key = "encoder" + node.name.replace("/", ".").replace(".mlp.mlp.", ".mlp.")
                linear = key.endswith("MatMul")
                for old, new in (("MatMul", "weight"), ("Add_1", "bias"), ("Mul", "weight"), ("Add", "bias")):
                    key = key.removesuffix(old) + (new if key.endswith(old) else "")
                tensors[key] = array.t() if linear else array
    return tensors


def run(path, feats, length):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert names == ["feats", "feats_length"]
    (indices,) = session.run(None, {"feats": feats.numpy(), "feats_length": np.array([length], np.int32)})
    assert indices.dtype == np.int64 and indices.shape[:2] == (1, 1)
    return indices.reshape(-1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tensors = random_tensors(width=24, blocks=2, codes=50)
    path = tmp_path_factory.mktemp("semantic") / "speech_tokenizer_v1.onnx"
    write_semantic_onnx(path, tensors, num_heads=3)
    return path, tensors


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 99, 100, 101, 333])
def test_codes_equal_torch(written, frames):
    path, tensors = written
    feats = torch.randn(1, 128, frames, generator=torch.Generator().manual_seed(frames))
    expected, gap = torch_codes(tensors, 3, feats, frames)
    codes = run(path, feats, frames)
    assert len(codes) == (frames + 3) // 4
    clear = gap > 1e-4
    assert clear.mean() > 0.9 and np.array_equal(codes[clear], expected[clear])


def test_frames_beyond_the_length_change_nothing(written):
    path, _ = written
    feats = torch.randn(1, 128, 200, generator=torch.Generator().manual_seed(7))
    alone = run(path, feats[:, :, :150].contiguous(), 150)
    assert np.array_equal(run(path, feats, 150)[: len(alone)], alone)


def test_tensors_come_back_by_the_release_rule(written):
    path, tensors = written
    found = by_release_rule(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_heads_and_strides_can_be_probed(written):
    nodes = {node.name: node for node in onnx.load(written[0]).graph.node}
    assert numpy_helper.to_array(nodes["/blocks.0/attn/Constant_1"].attribute[0].t) == 3
    for name in ("/conv1/Conv", "/conv2/Conv"):
        attributes = {a.name: list(a.ints) for a in nodes[name].attribute}
        assert attributes == {"kernel_shape": [3], "pads": [1, 1], "strides": [2]}


def test_golden_weights_written_by_us_give_the_golden_codes(tmp_path):
    tensors = by_release_rule(GOLDEN)
    path = tmp_path / "ours.onnx"
    write_semantic_onnx(path, tensors, num_heads=4)
    generator = torch.Generator().manual_seed(3)
    for frames in (100, 431):
        feats = torch.rand(1, 128, frames, generator=generator) * 2 - 0.7
        _, gap = torch_codes(tensors, 4, feats, frames)
        clear = gap > 1e-4
        assert np.array_equal(run(path, feats, frames)[clear], run(GOLDEN, feats, frames)[clear])


def test_same_tensors_same_bytes(written, tmp_path):
    path, tensors = written
    again = tmp_path / "again.onnx"
    write_semantic_onnx(again, tensors, num_heads=3)
    assert again.read_bytes() == path.read_bytes()
