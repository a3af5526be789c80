"""CAM++ as a module and as a file: release keys, the golden file's embeddings, onnxruntime, training."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from cosyvoice.campplus import CampPlus, CampPlusConfig, segment_means
from cosyvoice.onnx_export import write_campplus_onnx

GOLDEN = Path(__file__).parents[1] / "golden"
DIMS = json.loads((GOLDEN / "prompt_features" / "golden.json").read_text())["campplus"]["dims"]
GOLDEN_CONFIG = CampPlusConfig(
    growth_rate=DIMS["growth_rate"],
    bottleneck=DIMS["bn_size"],
    init_channels=DIMS["init_channels"],
    embedding_size=DIMS["embedding_size"],
)
SMALL = CampPlusConfig(
    embedding_size=24,
    growth_rate=4,
    bottleneck=2,
    init_channels=8,
    head_channels=4,
    block_layers=(2, 3),
    block_dilations=(1, 2),
)


def small_model(seed=0):
    """Random weights, and running statistics that are not the initial 0 and 1."""
    torch.manual_seed(seed)
    model = CampPlus(SMALL)
    for _ in range(3):
        model(torch.randn(4, 230, 80))
    return model.eval()


def run(path, fbank):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs() + session.get_outputs()] == ["input", "output"]
    return session.run(None, {"input": fbank.numpy()})[0]


def batch_norm_after(conv):
    """The batch norm that the golden file's exporter folded into this convolution."""
    if conv == "xvector.transit3.linear":
        return "xvector.out_nonlinear.batchnorm"
    for ending, norm in (
        (r"tdnn\.linear", "tdnn.nonlinear.batchnorm"),
        (r"\.linear1", ".nonlinear2.batchnorm"),
        (r"\.conv1", ".bn1"),
        (r"\.conv2", ".bn2"),
        (r"shortcut\.0", "shortcut.1"),
    ):
        if re.search(ending + "$", conv):
            return re.sub(ending + "$", norm, conv)
    raise AssertionError(conv)


def golden_model():
    """A module with the golden file's weights; folded batch norms become identity plus bias."""
    graph = onnx.load(GOLDEN / "prompt_features" / "campplus.onnx").graph
    arrays = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    model = CampPlus(GOLDEN_CONFIG)
    state = model.state_dict()
    filled = {name for name in arrays if name in state}
    state.update({name: arrays[name] for name in filled})
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1].startswith("onnx::"):
            conv = re.sub(r"(layer\d)\.\1", r"\1", node.name[1:].removesuffix("/Conv").replace("/", "."))
            conv = conv.replace("shortcut.shortcut", "shortcut")
            norm = batch_norm_after(conv)
            state[f"{conv}.weight"], state[f"{norm}.bias"] = arrays[node.input[1]], arrays[node.input[2]]
            state[f"{norm}.weight"], state[f"{norm}.running_mean"] = torch.ones(()), torch.zeros(())
            state[f"{norm}.running_var"] = torch.tensor(1 - 1e-5)
            filled |= {f"{conv}.weight"} | {f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert filled == {name for name in shapes if not name.endswith("num_batches_tracked")}
    model.load_state_dict({name: state[name].expand(shape) for name, shape in shapes.items()})
    return model.eval()


def test_keys_and_shapes_are_the_release_ones():
    manifest = json.loads((GOLDEN / "manifests" / "campplus.json").read_text())
    del manifest["_meta"]
    with torch.device("meta"):
        state = CampPlus(CampPlusConfig()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest


@pytest.mark.parametrize("frames", [199, 428])
def test_golden_weights_give_the_golden_embeddings(tmp_path, frames):
    model, path = golden_model(), tmp_path / "campplus.onnx"
    fbank = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(frames)) * 3
    expected = run(GOLDEN / "prompt_features" / "campplus.onnx", fbank)
    with torch.inference_mode():
        assert np.abs(model(fbank).numpy() - expected).max() < 1e-3
    write_campplus_onnx(path, model)
    assert np.abs(run(path, fbank) - expected).max() < 1e-3


@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (1, 201), (3, 199), (2, 400)])
def test_onnx_equals_torch(tmp_path, batch, frames):
    model, path = small_model(), tmp_path / "campplus.onnx"
    write_campplus_onnx(path, model)
    fbank = torch.randn(batch, frames, 80)
    with torch.inference_mode():
        expected = model(fbank).numpy()
    assert expected.shape == (batch, 24)
    np.testing.assert_allclose(run(path, fbank), expected, atol=2e-4)


def test_segment_means_of_a_short_last_segment():
    x = torch.arange(150.0).view(1, 1, 150)
    assert segment_means(x)[0, 0, [0, 99, 100, 149]].tolist() == [49.5, 49.5, 124.5, 124.5]


def test_two_speakers_can_be_learned():
    torch.manual_seed(1)
    model = CampPlus(SMALL)
    head = torch.nn.Linear(24, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    tilt = torch.linspace(-1, 1, 80)
    labels = torch.arange(16) % 2
    fbank = torch.randn(16, 60, 80) + (labels[:, None, None] * 2 - 1) * tilt
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(head(model(fbank)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.3 * losses[0]
