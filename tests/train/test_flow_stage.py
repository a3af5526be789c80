import json
from dataclasses import replace

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
    assert len(flow) == 120
    assert np.mean(flow[-10:]) < flow[0] / 4
    assert np.mean(prior[-10:]) < prior[0] / 2.5

    folder = out / "CosyVoice-300M-25Hz"
    assert read_config(folder) == DECODER
    loaded = TokenToMel.from_file(folder / "flow.pt", DECODER.flow)
    codes, mel, *_ = stage.take(item(0, 0, 0, 0, 0, 0), 8)
    assert torch.allclose(loaded.encode(codes, mel.shape[-1]), stage.average.encode(codes, mel.shape[-1]), atol=0.05)
    scores = json.loads((out / "scores.json").read_text())
    assert 0 < scores["flow"] < 10 and 0 < scores["decoded"] < 6
    assert (out / "samples.png").stat().st_size > 1000


@pytest.mark.gpu
def test_learns_as_graphs(corpus, learns_as_graphs):
    learns_as_graphs(
        lambda graphs: FlowStage(replace(config(60), graphs=graphs), DECODER, corpus, torch.device("cuda")), "flow"
    )


def item(*numbers):
    """One item: clip, first group, prompt's clip, its first group, groups of prompt, clip of the embedding."""
    return torch.tensor(numbers)[:, None]


def test_an_item_joins_prompt_and_target(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    codes, mel, embedding, prompt_codes, heard = stage.take(item(0, 3, 4, 2, 3, 5), 8)
    per_group = 5 / 41.667 * 22050 / 256
    assert codes.shape == (1, 40) and mel.shape == (1, 80, num_frames(40, DECODER.flow))
    assert prompt_codes.item() == 15 and heard.item() == int(3 * per_group)
    whole = [stage.codes.take(torch.tensor([clip]), torch.tensor([0]), 50)[0, :, 0].long() for clip in (0, 4)]
    assert torch.equal(codes[0, :15], whole[1][10:25]) and torch.equal(codes[0, 15:], whole[0][15:40])
    mels = [stage.mel.take(torch.tensor([clip]), torch.tensor([0]), 103)[0].T for clip in (0, 4)]
    start = int(2 * per_group)
    assert torch.equal(mel[0, :, : heard.item()], mels[1][:, start : start + heard.item()])
    rest = mel[0, :, heard.item() :]
    assert torch.equal(rest, mels[0][:, heard.item() : heard.item() + rest.shape[1]])
    assert torch.equal(embedding[0], torch.from_numpy(np.load(corpus / "embedding.npy")[5]))


def test_groups_fit_their_mel(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    for index, groups in enumerate(stage.groups):
        assert num_frames(5 * groups, DECODER.flow) <= stage.mel.length[index]
        assert 5 * groups >= stage.codes.length[index] - 5


def test_items_hold_what_they_should(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    rows = np.repeat(np.arange(8), 300)
    clip, target, source, begin, prompt, voice = stage.items(rows, 8, np.random.default_rng(0)).numpy()
    groups, speaker = stage.groups, np.array([one.speaker for one in stage.clips])
    assert (prompt <= 4).all() and 0.25 < (prompt == 0).mean() < 0.35
    assert (target + 8 - prompt <= groups[clip]).all() and (begin + prompt <= groups[source]).all()
    assert (speaker[source] == speaker[clip]).all() and (speaker[voice] == speaker[clip]).all()
    own = source == clip
    assert (target[own] == begin[own] + prompt[own]).all()
    assert 0.15 < (~own).mean() < 0.25 and (prompt[~own] > 0).all()  # half of the prompts, one of two is oneself
    assert target.min() == 0 and (target + 8 - prompt).max() == groups.max()


def test_the_same_batches_after_a_resume(corpus):
    stage = FlowStage(config(1), DECODER, corpus, CPU)
    first = [batch for batch, _ in zip(stage.batches(0), range(7))]
    again = [batch for batch, _ in zip(stage.batches(4), range(3))]
    assert all(torch.equal(a, b) and n == m for (a, n), (b, m) in zip(first[4:], again))
    assert sorted(torch.cat([items[0] for items, _ in first[:2]]).tolist()) == list(range(8))


def test_shipped_config(request):
    folder = request.config.rootpath / "configs" / "train" / "nano"
    assert run.read_config(folder / "flow.yaml", FlowStageConfig).loop.steps > 1000
    with torch.device("meta"):
        size = sum(p.numel() for p in TokenToMel(read_config(folder).flow).parameters())
    assert 8e6 < size < 9e6
