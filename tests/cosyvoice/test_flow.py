import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cosyvoice.config import FlowConfig, read_config
from cosyvoice.flow import FlowRequest, Segments, TokenToMel, collate, num_frames, stretch
from stepaudio.golden.flow import replay, request
from tokenizer.errors import CheckpointError, RequestError

GOLDEN = Path(__file__).parents[1] / "golden"
FLOW = GOLDEN / "flow"
CASES = ("prompted", "odd_len", "no_prompt")


@pytest.fixture(scope="module")
def config():
    return read_config(FLOW).flow


@pytest.fixture(scope="module")
def model(config):
    return TokenToMel.from_file(FLOW / "flow.safetensors", config)


@pytest.fixture(scope="module")
def requests():
    inputs = load_file(FLOW / "inputs.safetensors")
    return [request(inputs, name) for name in CASES]


def test_golden():
    rows = list(replay(GOLDEN))
    assert len(rows) == 2 + 3 * 7 + 3 * 5
    assert [row for row in rows if not row.ok] == []


def test_full_size_keys_are_those_of_the_release():
    manifest = json.loads((GOLDEN / "manifests" / "flow.json").read_text())
    meta = manifest.pop("_meta")
    with torch.device("meta"):
        model = TokenToMel(FlowConfig())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest
    assert sum(value.numel() for value in model.state_dict().values()) == meta["n_elements"] == 105399040


@pytest.mark.parametrize(
    ("codes", "frames"), [(0, 0), (1, 2), (5, 10), (270, 558), (585, 1209), (480, 992), (520, 1074)]
)
def test_num_frames(codes, frames):
    assert num_frames(codes, FlowConfig()) == frames


@pytest.mark.parametrize(("codes", "frames", "prompt"), [((9, 17), (20, 40), (4, 7)), ((5, 6), (3, 11), (0, 0))])
def test_stretch_interpolates_prompt_and_target_apart(codes, frames, prompt):
    x = torch.randn(2, max(codes), 3)
    out_prompt = [2 * p + 1 if p else 0 for p in prompt]
    out = stretch(
        x,
        max(frames),
        Segments(torch.tensor(prompt), torch.tensor(codes)),
        Segments(torch.tensor(out_prompt), torch.tensor(frames)),
    )
    for row, data, n, total, p, m in zip(out, x.transpose(1, 2), codes, frames, prompt, out_prompt):
        parts = [F.interpolate(data[None, :, p:n], size=total - m, mode="linear")[0]]
        if p:
            parts.insert(0, F.interpolate(data[None, :, :p], size=m, mode="linear")[0])
        assert torch.allclose(row[:, :total], torch.cat(parts, 1), atol=1e-5)


def test_batch_equals_one_by_one(model, requests):
    extra = dataclasses.replace(
        requests[0], codes=requests[0].codes[:1], noise=requests[0].noise[:, : 83 + num_frames(1, model.config)]
    )
    batch = [*requests, extra]
    together = model.generate(batch)
    for asked, mel in zip(batch, together):
        alone = model.generate([asked])[0]
        assert mel.shape == alone.shape == (80, num_frames(len(asked.codes), model.config))
        assert (mel - alone).abs().max() < 1e-4


def test_batch_of_equal_lengths_makes_no_mask(model, requests):
    other = dataclasses.replace(requests[0], embedding=requests[1].embedding)
    batch = collate([requests[0], other], model.config, torch.device("cpu"), torch.float32)
    assert batch.code_lengths is None and batch.frame_lengths is None
    for asked, mel in zip([requests[0], other], model.generate([requests[0], other])):
        assert (mel - model.generate([asked])[0]).abs().max() < 1e-4


def test_bf16_batch(config, requests):
    model = TokenToMel.from_file(FLOW / "flow.safetensors", config, dtype=torch.bfloat16)
    observed = json.loads((FLOW / "golden.json").read_text())["cases"]
    expected = load_file(FLOW / "golden_bf16.safetensors")
    for mel, case in zip(model.generate(requests), observed):
        assert mel.dtype == torch.bfloat16
        difference = (mel.float() - expected[f"{case['name']}.mel"].float()).abs().mean()
        assert difference < 2 * case["observed"]["mel"]["bf16_vs_fp32_mean"]


def test_number_of_steps_is_an_argument(model, requests):
    one, ten = model.generate([requests[2]], num_steps=1)[0], model.generate([requests[2]])[0]
    assert one.shape == ten.shape and not torch.allclose(one, ten, atol=1e-2)
    with pytest.raises(RequestError, match="num_steps is 0"):
        model.generate([requests[2]], num_steps=0)


def test_codes_below_zero_count_as_zero(model, requests):
    asked = requests[1]
    assert int(asked.codes.min()) < 0
    clamped = dataclasses.replace(asked, codes=asked.codes.clamp(min=0))
    assert torch.equal(model.generate([asked])[0], model.generate([clamped])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"codes": r.codes[:0]}, "0 audio codes give no mel frame"),
        (lambda r: {"codes": r.codes + 5120}, r"audio code \d+ is outside 0..5119"),
        (lambda r: {"prompt_codes": r.prompt_codes[:0]}, "0 codes and 83 mel frames"),
        (lambda r: {"prompt_mel": r.prompt_mel[:0]}, "40 codes and 0 mel frames"),
        (lambda r: {"prompt_mel": r.prompt_mel[:, :40]}, r"prompt mel has shape \(83, 40\)"),
        (lambda r: {"embedding": r.embedding[:100]}, r"speaker embedding has shape \(100,\)"),
        (lambda r: {"noise": r.noise[:, 1:]}, r"noise has shape \(80, 212\), this model takes \(80, 213\)"),
    ],
)
def test_bad_requests(model, requests, change, message):
    with pytest.raises(RequestError, match=message):
        model.generate([requests[1], dataclasses.replace(requests[0], **change(requests[0]))])


def test_weights_that_disagree_with_the_config(tmp_path, config):
    tensors = load_file(FLOW / "flow.safetensors")
    wrapped = tmp_path / "flow.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, wrapped)
    assert TokenToMel.from_file(wrapped, config).state_dict().keys() == tensors.keys()
    with pytest.raises(CheckpointError, match=r"flow\.pt: .* has shape .*, the config asks for"):
        TokenToMel.from_file(wrapped, dataclasses.replace(config, spk_embed_dim=64))
    torch.save({name: value for name, value in tensors.items() if name != "encoder_proj.bias"}, wrapped)
    with pytest.raises(CheckpointError, match=r"1 missing, first 'encoder_proj\.bias'"):
        TokenToMel.from_file(wrapped, config)


def test_training_path_is_differentiable_and_masked(config):
    torch.manual_seed(0)
    model = TokenToMel(config)
    codes, code_lengths, frame_lengths = torch.randint(0, 5120, (2, 12)), torch.tensor([12, 7]), torch.tensor([25, 14])
    mu = model.encode(codes, 25, code_lengths, frame_lengths)
    alone = model.encode(codes[1:, :7], 14)
    assert (mu[1, :, :14] - alone[0]).abs().max() < 1e-5
    assert (mu[1, :, 14:] == 0).all()
    mask = model.frame_mask(frame_lengths, 25)
    velocity = model.decoder.estimator(
        torch.randn(2, 80, 25), mask, mu, torch.rand(2), model.speaker(torch.randn(2, 192)), torch.zeros(2, 80, 25)
    )
    ((velocity - 1) * mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert math.isclose(float(mask.sum()), 39)


def test_request_is_unchanged_by_its_use(model, requests):
    before = FlowRequest(*(getattr(requests[0], field.name).clone() for field in dataclasses.fields(FlowRequest)))
    model.generate(requests)
    for field in dataclasses.fields(FlowRequest):
        assert torch.equal(getattr(before, field.name), getattr(requests[0], field.name))
