import numpy as np
import pytest
import torch

from stepaudio.export.vocabulary import write_vocabulary
from stepaudio.lm.local import LocalLM
from stepaudio.lm.vocab import Vocab
from stepaudio.train.codes import Codes
from stepaudio.train.data import Clip
from stepaudio.train.domain import dialogue
from stepaudio.train.lm import LmConfig, LmStage, Pools
from stepaudio.train.loop import LoopConfig, fit
from stepaudio.train.sequences import Sequences, Voices, written
from stepaudio.train.vocabulary import nano_vocabulary
from stepaudio.tts.prompt import system_prompt

CPU = torch.device("cpu")
SMALL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_attention_groups": 1},
    **{"num_hidden_layers": 2, "max_seq_len": 512},
}


def sequences(folder):
    """Eight clips of two voices, one second each, and one dialogue."""
    rng = np.random.default_rng(0)
    group = lambda: [*rng.integers(0, 20, 2), *rng.integers(1024, 1050, 3)]  # noqa: E731
    codes = np.concatenate([np.concatenate([group() for _ in range(8)]) for _ in range(8)])
    texts = ["yes", "no", "hello", "bye", "one", "two", "red", "blue"]
    clips = [
        Clip(str(i), text, f"train/flite:{('rms', 'slt')[i % 2]}@1x1", "en", "train", 0, 16000)
        for i, text in enumerate(texts)
    ]
    write_vocabulary(
        folder,
        nano_vocabulary(["abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.?#\"'0123456789"], [system_prompt()]),
        False,
    )
    talk = dialogue("greeting", "en", "hello", "bye", "bye")
    voices = Voices({"flite:rms": "rms"}, {})
    return Sequences(Vocab.from_file(folder), clips, Codes(codes, 40 * np.arange(1, 9)), [talk], voices, {})


def test_only_what_the_model_says_is_predicted(tmp_path):
    made = sequences(tmp_path)
    vocab = made.vocab
    rng = np.random.default_rng(0)
    spoken = made.asr(rng, 2)
    assert vocab.decode(spoken.ids[spoken.wanted].tolist()) == "hello"
    assert spoken.ids[spoken.wanted][-1] == vocab.eot
    speech = made.tts(rng, 4)
    target = speech.ids[speech.wanted]
    assert (target[:-1] - vocab.audio_base).tolist() == made.codes[4].interleaved.tolist()
    talk = made.draw(rng, "text")
    assert vocab.decode(talk.ids[talk.wanted].tolist()) == "bye"


def test_texts_come_plain_and_as_people_write_them():
    rng = np.random.default_rng(0)
    assert {written(rng, "Hello there") for _ in range(60)} == {"hello there", "Hello there.", "Hello there?"}


def test_the_same_number_gives_the_same_batches(tmp_path):
    data = Pools(sequences(tmp_path), LmConfig(LoopConfig(steps=4), SMALL, tokens_per_batch=600, workers=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data[1], data[1]))
    shapes = [tuple(ids.shape) for number in range(2) for ids, _ in data[number]]
    assert all(rows == max(1, 600 // length) for rows, length in shapes)


def test_overfits_eight_clips_and_exports(logged, tmp_path):
    out = tmp_path / "out"
    config = LmConfig(LoopConfig(steps=60, rate=1e-2), SMALL, tokens_per_batch=1200, workers=0)
    stage = LmStage(config, sequences(tmp_path), CPU, lambda stage, folder: stage.write(folder))
    assert fit(stage, config.loop, out, CPU) == 60
    loss = logged(out, "loss")
    assert loss[-1] < 0.75 * loss[0]
    write_vocabulary(out, nano_vocabulary(["a"], []), False)
    assert LocalLM.from_dir(out).max_context == 512


@pytest.mark.gpu
def test_captured_steps_learn_as_plain_ones(logged, tmp_path):
    made, last = sequences(tmp_path), {}
    for graphs in (True, False):
        config = LmConfig(LoopConfig(steps=60, rate=1e-2), SMALL, tokens_per_batch=1200, workers=0, graphs=graphs)
        torch.manual_seed(0)
        stage = LmStage(config, made, torch.device("cuda"), lambda stage, folder: None)
        assert fit(stage, config.loop, tmp_path / str(graphs), torch.device("cuda")) == 60
        last[graphs] = logged(tmp_path / str(graphs), "loss")
    assert last[True][0] == pytest.approx(last[False][0], rel=0.02)
    assert last[True][-1] < 0.75 * last[True][0]
    assert np.mean(last[True][-10:]) == pytest.approx(np.mean(last[False][-10:]), rel=0.25)
