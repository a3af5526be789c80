import json

import numpy as np
import pytest
import torch

from cosyvoice.config import CosyVoiceConfig, EncoderConfig, EstimatorConfig, FlowConfig, read_config
from cosyvoice.flow import TokenToMel, num_frames
from stepaudio.train import run
from stepaudio.train.data import Corpus
from stepaudio.train.flow import FlowStage, FlowStageConfig
from stepaudio.train.loop import LoopConfig, fit
from tokenizer.codes import AudioCodes

CPU = torch.device("cpu")
DECODER = CosyVoiceConfig(
    flow=FlowConfig(
        input_size=16,
        encoder=EncoderConfig(input_size=16, output_size=32, attention_heads=2, linear_units=64, num_blocks=1),
        estimator=EstimatorConfig(channels=(48, 48), attention_head_dim=24, n_blocks=1, num_mid_blocks=1, num_heads=2),
    )
)


def config(steps):
    return FlowStageConfig(LoopConfig(steps=steps, rate=6e-3, clip=10.0), seconds_per_batch=4.0, test_clips=2)


@pytest.fixture
def corpus(tones):
    """Tones whose codes say which vowel sounds: the loudest mel band of each code's time."""
    folder = tones("mel")
    mel, ends = np.load(folder / "mel.npy").astype(np.float32), np.load(folder / "mel_ends.npy")
    streams = []
    for clip, (start, end) in zip(Corpus.open(folder).clips, zip([0, *ends], ends)):
        bands = mel[start:end].argmax(axis=1)
        linguistic, semantic = (
            bands[(np.arange(int(clip.seconds * rate)) * 86.13 / rate).astype(int)] for rate in (100 / 6, 25)
        )
        streams.append(AudioCodes.merge(linguistic, semantic).interleaved)
    np.save(folder / "codes.npy", np.concatenate(streams).astype(np.int16))
    np.save(folder / "codes_ends.npy", np.cumsum([len(stream) for stream in streams]))
    np.save(folder / "embedding.npy", np.random.default_rng(0).standard_normal((10, 192)).astype(np.float32))
    np.save(folder / "embedding_ends.npy", np.arange(1, 11))
    return folder


def test_overfits_resumes_and_exports(corpus, logged, tmp_path):
    out = tmp_path / "out"
    assert fit(FlowStage(config(20), DECODER, corpus, CPU), config(20).loop, out, CPU) == 20
    stage = FlowStage(config(120), DECODER, corpus, CPU)
    assert fit(stage, config(120).loop, out, CPU) == 120
    flow, prior = logged(out, "flow"), logged(out, "prior")
    assert len(flow) == 12
    assert flow[-1] < flow[0] / 4
    assert prior[-1] < prior[0] / 2.5

    folder = out / "CosyVoice-300M-25Hz"
    assert read_config(folder) == DECODER
    loaded = TokenToMel.from_file(folder / "flow.pt", DECODER.flow)
    codes, mel, _ = stage.take([0], np.random.default_rng(0))
    assert torch.allclose(loaded.encode(codes, mel.shape[-1]), stage.model.encode(codes, mel.shape[-1]), atol=0.05)
    scores = json.loads((out / "scores.json").read_text())
    assert 0 < scores["flow"] < 10 and 0 < scores["decoded"] < 6
    assert (out / "samples.png").stat().st_size > 1000


def test_crops_lie_at_group_bounds(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    stage.groups[1] -= 4
    codes, mel, embedding = stage.take([0, 1], np.random.default_rng(1))
    groups = stage.groups[1]
    assert codes.shape == (2, 5 * groups) and embedding.shape == (2, 192)
    assert mel.shape == (2, 80, num_frames(5 * groups, DECODER.flow))
    assert (codes[:, 0::5] < 1024).all() and (codes[:, 2::5] >= 1024).all()
    assert torch.equal(mel[1], stage.mel.whole(1)[: mel.shape[-1]].T)
    whole = stage.mel.whole(0)
    starts = [at for at in range(len(whole)) if torch.equal(whole[at : at + mel.shape[-1]].T, mel[0])]
    assert starts and starts[0] in [round(group * 10.3359) for group in range(5)]


def test_groups_fit_their_mel(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    for index, groups in enumerate(stage.groups):
        assert num_frames(5 * groups, DECODER.flow) <= stage.mel.length(index)
        assert 5 * groups >= stage.codes.length(index) - 5


def test_prompts_are_the_first_frames(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    torch.manual_seed(0)
    mel = torch.randn(400, 80, 50)
    prompt = stage.prompt(mel)
    kept = (prompt != 0).all(dim=1)
    lengths = kept.sum(dim=1)
    assert lengths.max() < 0.4 * 50 + 1 and 0.2 < (lengths == 0).float().mean() < 0.45
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(prompt[row, :, :length], mel[row, :, :length]) and not prompt[row, :, length:].any()


def test_shipped_config(request):
    folder = request.config.rootpath / "configs" / "train" / "nano"
    assert run.read_config(folder / "flow.yaml", FlowStageConfig).loop.steps > 1000
    with torch.device("meta"):
        size = sum(p.numel() for p in TokenToMel(read_config(folder).flow).parameters())
    assert 8e6 < size < 9e6
