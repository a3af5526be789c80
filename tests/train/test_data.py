import random

import numpy as np
import pytest
import soundfile

from stepaudio.train.data import Clip, Corpus, recorded, write_corpus
from stepaudio.train.features import Features, length_batches
from stepaudio.train.nano_data import alphabet, at_speed, splice
from stepaudio.train.rooms import in_a_room
from tokenizer.errors import RequestError


def test_recordings_become_a_corpus_with_copies_at_other_speeds(tmp_path):
    speech = tmp_path / "set"
    speech.mkdir()
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)
    soundfile.write(speech / "a.wav", tone, 16000)
    rows = ["id\tfile\ttext\tspeaker\tlang\tsplit\tseconds", "a\ta.wav\tHELLO\tann\ten\ttrain\t1.0"]
    (speech / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    [one] = recorded(speech, "set")
    corpus = write_corpus(tmp_path / "corpus", [one, at_speed(one, 1.25)], workers=1)
    slow, fast = corpus.clips
    assert (slow.text, slow.speaker, slow.length) == ("HELLO", "set/ann", 16000)
    assert (fast.speaker, fast.length) == ("set/ann~1.25", 12800)
    spectrum = np.abs(np.fft.rfft(corpus.sound(fast)))
    assert spectrum.argmax() * 16000 / fast.length == pytest.approx(250, abs=2)


def test_a_folder_without_transcripts_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"transcripts\.tsv is missing"):
        list(recorded(tmp_path, "set"))
    with pytest.raises(RequestError, match="--stage data"):
        Corpus.open(tmp_path)


def test_features_are_gathered_with_zeros_past_the_end():
    import torch

    features = Features(torch.arange(1, 8, dtype=torch.float16)[:, None], np.array([3, 7]))
    values, lengths = features.gather([0, 1], 5)
    assert lengths.tolist() == [3, 4]
    assert values[..., 0].tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]]


def test_batches_hold_clips_of_like_length_and_go_on_after_a_resume():
    clips = [Clip(str(i), "", "", "en", "train", 0, 16000 * (1 + i % 4)) for i in range(40)]
    batches = length_batches(clips, 8.0, seed=0)
    first = [next(batches) for _ in range(12)]
    again = length_batches(clips, 8.0, seed=0, start=5)
    assert [next(again) for _ in range(7)] == first[5:]
    for indices, seconds in first:
        assert all(seconds - 0.8 < clips[i].seconds <= seconds for i in indices)


def test_a_room_keeps_length_and_adds_noise():
    quiet = np.zeros(16_000, np.float32)
    quiet[4_000:8_000] = 0.3 * np.sin(np.arange(4_000) * 0.1)
    heard = in_a_room(quiet, seed=3)
    assert len(heard) == len(quiet) and np.abs(heard).max() < 0.96
    assert np.array_equal(heard, in_a_room(quiet, seed=3)) and not np.array_equal(heard, in_a_room(quiet, seed=4))
    before, after = np.abs(heard[:3_900]).mean(), np.abs(heard[8_050:9_000]).mean()
    assert 0 < before < after  # noise everywhere, echoes after the sound


def test_open_lines_mix_what_is_known():
    rng = random.Random(0)
    texts = ["what is the capital of france", "set a timer"]
    for _ in range(50):
        words = splice(rng, texts, "en").split()
        assert set(words) <= set(" ".join(texts).split())
        assert set(splice(rng, ["今天天气很好", "我喜欢苹果"], "zh")) <= set("今天天气很好我喜欢苹果")
        assert set(alphabet(rng)) <= set("abcdefghijklmnopqrstuvwxyz ")
