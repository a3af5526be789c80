"""Padded to a bucket, batched, captured or fused: the decoder's results are those of the plain modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosyvoice.buckets import flow_bucket, vocoder_bucket
from cosyvoice.config import EncoderConfig, EstimatorConfig, FlowConfig, HiFTConfig
from cosyvoice.flow import FlowRequest, TokenToMel, num_frames
from cosyvoice.flow_engine import FlowEngine, choose
from cosyvoice.hift import HiFTVocoder, SourceDraws
from cosyvoice.vocoder_engine import VocoderEngine
from tokenizer.errors import RequestError

FLOW = FlowConfig(
    input_size=32,
    encoder=EncoderConfig(input_size=32, output_size=32, attention_heads=2, linear_units=64, num_blocks=2),
    estimator=EstimatorConfig(channels=(32, 32), attention_head_dim=16, n_blocks=1, num_mid_blocks=2, num_heads=2),
)
HIFT = HiFTConfig(base_channels=64, f0_cond_channels=16)
CUDA = torch.device("cuda", 0)


def seeded(module, device="cpu"):
    torch.manual_seed(0)
    return module().to(device).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def flow():
    return seeded(lambda: TokenToMel(FLOW))


@pytest.fixture(scope="module")
def vocoder():
    return seeded(lambda: HiFTVocoder(HIFT))


def request(codes, prompt_codes, prompt_frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return FlowRequest(
        codes=torch.randint(5120, (codes,), generator=generator),
        prompt_codes=torch.randint(5120, (prompt_codes,), generator=generator),
        prompt_mel=torch.randn(prompt_frames, 80, generator=generator),
        embedding=torch.randn(192, generator=generator),
        noise=torch.randn(80, prompt_frames + num_frames(codes, FLOW), generator=generator),
    )


REQUESTS = [request(1, 0, 0), request(5, 30, 31, 1), request(33, 80, 99, 2), request(62, 0, 0, 3)]


def padded(model):
    """The engine as it runs on a GPU, less the graph."""
    engine = FlowEngine(model, "plain")
    engine.engine = "graph"
    return engine


def compare(got, wanted, largest, what):
    assert got.shape == wanted.shape
    apart = (got.float() - wanted.float()).abs()
    print(f"{what}: largest difference {apart.max():.2g}, mean {apart.mean():.2g}")
    assert apart.max() < largest, what


def test_a_bucket_changes_nothing(flow):
    """Exact lengths against padding in both directions, alone and in a batch with rows that only fill it up."""
    engine = padded(flow)
    alone = [flow.generate([one], 3)[0] for one in REQUESTS]
    for one, wanted in zip(REQUESTS, alone):
        compare(engine.generate([one], 3)[0], wanted, 2e-5, f"{wanted.shape[1]} frames")
    for got, wanted in zip(engine.generate(REQUESTS[:3], 3), alone):
        compare(got, wanted, 2e-5, "batch of 3 in 4")


@pytest.mark.parametrize("frames", [1, 2, 31, 33, 70])
def test_a_bucket_changes_no_sound(vocoder, frames):
    engine = VocoderEngine(vocoder, "plain")
    engine.engine = "graph"
    generator = torch.Generator().manual_seed(frames)
    mel, draws = torch.randn(1, 80, frames, generator=generator), SourceDraws.draw(HIFT, frames, generator)
    wanted = vocoder(mel, draws)
    got = engine.run(mel, draws, f0=wanted.f0)
    compare(got.wav, wanted.wav, 1e-5, f"{frames} frames")
    compare(got.source, wanted.source, 1e-6, f"{frames} frames, source")
    compare(engine.pitch(mel), wanted.f0, 1e-4, f"{frames} frames, f0")


def test_mixed_noise_has_the_spread_of_single_noises():
    vocoder = seeded(lambda: HiFTVocoder(HIFT))
    f0 = torch.zeros(1, 200)  # unvoiced: noise alone
    generator = torch.Generator().manual_seed(0)
    mixed = SourceDraws.draw(HIFT, 200, generator)
    single = SourceDraws(mixed.phases, torch.randn(1, 9, 200 * 256, generator=generator))
    bias = vocoder.m_source.l_linear.bias
    spreads = [(vocoder.m_source(f0, draws).atanh() - bias).std() for draws in (mixed, single)]
    assert float(spreads[0] / spreads[1]) == pytest.approx(1.0, rel=0.02)


def test_engines_are_checked():
    cpu = torch.device("cpu")
    assert choose("auto", cpu, None) == choose("plain", CUDA, None) == "plain"
    assert choose("auto", CUDA, None) == "fused" and choose("auto", CUDA, "no Triton") == "graph"
    with pytest.raises(RequestError, match="needs a CUDA device"):
        choose("graph", cpu, None)
    with pytest.raises(RequestError, match='engine "fused" cannot run: no Triton'):
        choose("fused", CUDA, "no Triton")
    with pytest.raises(RequestError, match="'turbo' is unknown: use auto, fused, graph, plain"):
        choose("turbo", CUDA, None)


def test_precision_is_checked(vocoder):
    with pytest.raises(RequestError, match="precision 'float8' is unknown"):
        VocoderEngine(vocoder, precision="float8")


def test_buckets_hold_what_they_are_for():
    for frames in (1, 63, 64, 65, 500, 513, 1537, 4096):
        rows, wide, places = flow_bucket(3, frames, frames // 2)
        assert rows == 4 and wide >= frames and wide % 64 == 0 and places >= frames // 2
        assert vocoder_bucket(1, frames)[1] >= frames
    assert flow_bucket(1, 100, 400)[2] >= 400  # a prompt with more codes than its mel has room for
    assert flow_bucket(1, 5000, 2000) is None and flow_bucket(64, 2000, 900) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "dtype"), [("graph", torch.float32), ("fused", torch.bfloat16)])
def test_the_flow_on_a_gpu(engine, dtype):
    """The plain modules against graphs and kernels: odd lengths, a batch, a shape seen before and one not seen."""
    model = seeded(lambda: TokenToMel(FLOW), CUDA)
    exact = [model.generate([one], 3)[0] for one in REQUESTS]
    model = model.to(dtype)
    plain = [model.generate([one], 3)[0] for one in REQUESTS]
    fast = FlowEngine(model, engine)
    bound = 1e-4 if dtype == torch.float32 else 2 * max(float((a - b).abs().max()) for a, b in zip(exact, plain))
    for _ in range(2):
        for one, wanted in zip(REQUESTS, exact):
            compare(fast.generate([one], 3)[0], wanted, bound, f"{engine}, {wanted.shape[1]} frames")
    for got, wanted in zip(fast.generate(REQUESTS, 3), exact):
        compare(got, wanted, bound, f"{engine}, batch")
    again = [fast.generate(REQUESTS[1:2], 3)[0] for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.gpu
def test_the_released_shapes_on_a_gpu():
    """The kernels at full width, 1 frame to 30 s: no farther from float32 than twice the plain bfloat16 modules."""
    full = FlowConfig()
    full = replace(full, estimator=replace(full.estimator, num_mid_blocks=2))
    model = seeded(lambda: TokenToMel(full), CUDA)
    requests = [request(codes, 165, 341, codes) for codes in (1, 40, 415, 1250)] + [request(40, 0, 0)]
    exact = [model.generate([one])[0] for one in requests]
    model = model.bfloat16()
    fast = FlowEngine(model, "fused")
    for one, wanted in zip(requests, exact):
        [got], [plain] = fast.generate([one]), model.generate([one])
        near, far = ((value.float() - wanted).abs().mean() for value in (got, plain))
        print(f"{wanted.shape[1]} frames: fused {near:.4f}, plain {far:.4f} mean difference from float32")
        assert near < 2 * far + 1e-3
    for got, wanted in zip(fast.generate(requests), exact):
        assert (got.float() - wanted).abs().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "precision", "bound"), [
    ("graph", "float32", 1e-4),
    ("fused", "float32", 3e-4),
    ("fused", "float16", 2e-2),
])  # fmt: skip
def test_the_vocoder_on_a_gpu(engine, precision, bound):
    vocoder = seeded(lambda: HiFTVocoder(HiFTConfig()), CUDA)
    fast = VocoderEngine(vocoder, engine, precision)
    for frames in (1, 33, 200, 861, 2584):
        generator = torch.Generator().manual_seed(frames)
        draws = SourceDraws.draw(HIFT, frames, generator).to(CUDA)
        mel = torch.randn(1, 80, frames, generator=generator).to(CUDA)
        wanted = vocoder(mel, draws)
        for _ in range(2):
            compare(fast.run(mel, draws, f0=wanted.f0).wav, wanted.wav, bound, f"{engine} {precision}, {frames}")
        compare(fast.run(mel, draws).f0, wanted.f0, 1e-3, "f0")
    lengths = torch.tensor([40, 7, 23]).to(CUDA)
    mel = torch.randn(3, 80, 40).to(CUDA)
    draws = SourceDraws.batch([SourceDraws.draw(HIFT, 40, torch.Generator().manual_seed(i)) for i in range(3)]).to(CUDA)
    wanted = vocoder(mel, draws, lengths)
    compare(fast.run(mel, draws, lengths, wanted.f0).wav, wanted.wav, bound, "batch")


@pytest.mark.gpu
def test_many_lengths_leave_the_memory_flat():
    model = seeded(lambda: TokenToMel(FLOW), CUDA).bfloat16()
    engine = FlowEngine(model, "fused")
    engine.pool.limit = 4
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (200,), generator=generator).tolist()
    for at, codes in enumerate(lengths):
        engine.generate([request(codes, 0, 0)], 1)
        if at == 60:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    print(f"allocated {before[0]} -> {after[0]}, reserved {before[1]} -> {after[1]} bytes, {len(engine.pool)} graphs")
    assert len(engine.pool) <= 4
    assert after[0] - before[0] < 8 << 20 and after[1] - before[1] < 64 << 20
