"""A corpus of harmonic tones: eight clips of four voices, each a row of steady vowels."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from stepaudio.train.data import Clip, Corpus
from stepaudio.train.features import MAKERS
from stepaudio.train.loop import fit

RATE = 16_000
PITCHES = (110.0, 150.0, 210.0, 290.0)  # one per voice
VOWELS = ((700, 1200, 2600), (300, 2300, 3000), (500, 900, 2400))  # formants in Hz


def vowel(pitch, formants, seconds, shift=1.0):
    time = np.arange(int(seconds * RATE)) / RATE
    sound = np.zeros_like(time)
    for harmonic in range(1, int(7000 / pitch)):
        frequency = harmonic * pitch
        weight = sum(np.exp(-(((frequency - shift * f) / 200) ** 2)) for f in formants) + 0.01
        sound += weight * np.sin(2 * np.pi * frequency * time + harmonic)
    edge = np.minimum(1, np.minimum(time, seconds - time) / 0.02)
    return 0.2 * sound / np.abs(sound).max() * edge


def write_features(folder, kinds):
    corpus = Corpus.open(folder)
    for kind in kinds:
        pieces = [MAKERS[kind](corpus.sound(clip)) for clip in corpus.clips]
        flat = np.concatenate(pieces)
        np.save(folder / f"{kind}.npy", flat if flat.dtype == np.int16 else flat.astype(np.float16))
        np.save(folder / f"{kind}_ends.npy", np.cumsum([len(piece) for piece in pieces]))


def write_tones(folder, kinds):
    """Eight training clips and two test clips of a fifth voice, with features of the given kinds."""
    rng = np.random.default_rng(0)
    clips, pieces, start = [], [], 0
    for number in range(10):
        voice = number % len(PITCHES) if number < 8 else len(PITCHES)
        pitch = (*PITCHES, 180.0)[voice]
        order = rng.integers(len(VOWELS), size=4)
        sound = np.concatenate([vowel(pitch, VOWELS[at], 0.3, 0.6 + 0.2 * voice) for at in order])
        sound += 0.001 * rng.standard_normal(len(sound))
        samples = np.round(sound * 32767).astype(np.int16)
        split = "train" if number < 8 else "test"
        clips.append(Clip(f"clip{number}", "a", f"tones/{voice}", "en", split, start, len(samples)))
        pieces.append(samples)
        start += len(samples)
    np.save(folder / "samples.npy", np.concatenate(pieces))
    (folder / "clips.jsonl").write_text("".join(json.dumps(asdict(clip)) + "\n" for clip in clips))
    write_features(folder, kinds)
    return folder


@pytest.fixture
def tones(tmp_path):
    """`tones(*kinds)` makes the corpus."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return lambda *kinds: write_tones(folder, kinds)


def losses(folder, name):
    """The logged values of a loss."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.fixture
def logged():
    return losses


@pytest.fixture
def learns_as_graphs(tmp_path):
    """`learns_as_graphs(make, name)` trains `make(graphs)` on a CUDA device with graphs and without, and compares."""
    return lambda make, name: compare_graphs(make, name, tmp_path)


def compare_graphs(make, name, folder):
    ends = []
    for graphs in (True, False):
        stage = make(graphs)
        steps = fit(stage, stage.config.loop, folder / str(graphs), torch.device("cuda"))
        values = losses(folder / str(graphs), name)
        assert (len(stage.graphed) > 0) == graphs
        assert len(set(values)) > 0.9 * steps and np.mean(values[-8:]) < np.mean(values[:4])
        ends.append(np.mean(values[-8:]))
    print(f"{name}: {ends[0]:.3f} as graphs, {ends[1]:.3f} without")
    assert ends[0] == pytest.approx(ends[1], rel=0.6)
