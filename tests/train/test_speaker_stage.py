import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosyvoice.speaker import SpeakerEncoder
from stepaudio.train.data import Corpus
from stepaudio.train.loop import LoopConfig, fit
from stepaudio.train.run import read_config
from stepaudio.train.speaker import (
    SpeakerConfig,
    SpeakerStage,
    change_speed,
    equal_error_rate,
    identity,
    split_speakers,
)
from tokenizer.audio import Audio

CPU = torch.device("cpu")
SMALL = {"growth_rate": 8, "init_channels": 32, "head_channels": 4, "block_layers": (1, 2, 1)}


def config(steps):
    loop = LoopConfig(steps=steps, rate=1e-2, weight_decay=0.0)
    return SpeakerConfig(
        loop, SMALL, crops=24, frames=(80,), margin=0.05, scale=10.0, noise=0.1, held_out=0.0, trial_crops=4
    )


def test_overfits_resumes_and_exports(tones, logged, tmp_path):
    folder = tones("fbank80")
    out = tmp_path / "out"
    assert fit(SpeakerStage(config(50), folder, CPU), config(50).loop, out, CPU) == 50
    first = logged(out, "loss")
    assert fit(SpeakerStage(config(70), folder, CPU), config(70).loop, out, CPU) == 70
    loss = logged(out, "loss")
    assert loss[: len(first)] == first and len(loss) == 70
    assert np.mean(loss[-5:]) < np.mean(loss[:5]) / 2
    assert np.mean(logged(out, "right")[-5:]) > 0.6

    encoder = SpeakerEncoder.from_file(out / "CosyVoice-300M-25Hz" / "campplus.onnx", threads=1)
    corpus = Corpus.open(folder)
    embeddings = np.load(folder / "embedding.npy")
    assert embeddings.shape == (10, 192) and np.load(folder / "embedding_ends.npy").tolist() == list(range(1, 11))
    whole = encoder.embed(Audio(corpus.sound(corpus.clips[0]), 16_000))
    assert torch.cosine_similarity(whole, torch.from_numpy(embeddings[0]), dim=0) > 0.9
    similar = embeddings[:8] @ embeddings[:8].T / np.outer(*[np.linalg.norm(embeddings[:8], axis=1)] * 2)
    assert (np.argsort(-similar, axis=1)[:, 1] == (np.arange(8) + 4) % 8).all()  # the voice's other clip
    scores = json.loads((out / "scores.json").read_text())
    assert scores["speakers"] == 4 and scores["unseen speakers"] == 1


@pytest.mark.gpu
def test_learns_as_graphs(tones, learns_as_graphs):
    folder = tones("fbank80")
    learns_as_graphs(
        lambda graphs: SpeakerStage(replace(config(60), graphs=graphs), folder, torch.device("cuda")), "loss"
    )


def test_speed_one_changes_nothing_and_faster_is_higher():
    x = torch.randn(2, 60, 80)
    assert torch.allclose(change_speed(x, torch.ones(2), 50), x[:, :50], atol=1e-3)
    line = torch.zeros(1, 60, 80)
    line[:, :, 40] = 1.0
    faster, slower = (change_speed(line, torch.tensor([f]), 50)[0, 10].argmax().item() for f in (1.1, 0.9))
    assert slower < 40 < faster


def test_equal_error_rate():
    same = np.array([True] * 50 + [False] * 50)
    assert equal_error_rate(np.where(same, 1.0, 0.0), same) == 0
    assert equal_error_rate(np.where(same, 0.0, 1.0), same) == 1
    mixed = np.where(same, 1.0, 0.0)
    mixed[:5], mixed[50:55] = -1.0, 2.0
    assert equal_error_rate(mixed, same) == pytest.approx(0.1)


def test_who_is_trained_on():
    assert identity("train/flite:rms@1.1x0.88") == identity("test/flite:rms@1x0.88") == "synthetic/flite:rms@0.88"
    assert identity("an4/fash") == "an4/fash"
    speakers = {f"set/{i}": ([2 * i, 2 * i + 1], {2 * i}) for i in range(20)}
    speakers |= {"set/test": ([50], set()), "synthetic/a@1": ([60], {60})}
    train, unseen = split_speakers(speakers, 0.1, seed=0)
    assert len(train) == 19 and len(unseen) == 3 and "set/test" in unseen and "synthetic/a@1" in train
    assert all(len(clips) == 1 for clips in train.values())
    assert split_speakers(speakers, 0.1, seed=0) == (train, unseen)


def test_shipped_config(request):
    path = request.config.rootpath / "configs" / "train" / "nano" / "speaker.yaml"
    assert read_config(path, SpeakerConfig).loop.steps > 1000
