"""Held-out questions, strangers, the store and the processes, with stand-ins for the models."""

from pathlib import Path

import numpy as np
import pytest

from stepaudio.eval.crew import Crew, Setup, engine, prepare
from stepaudio.eval.desk import Desk
from stepaudio.eval.exam import Exam
from stepaudio.eval.nano import PARTS, evaluate
from stepaudio.eval.rows import Results, Run, figure
from stepaudio.eval.store import Store, Take
from stepaudio.train.text import plain
from tests.scripts.runner import run_script
from tokenizer.audio import Audio, write_audio

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train" / "nano"


@pytest.fixture(scope="module")
def exam():
    return small()


def small():
    """An exam after less training material than the real one."""
    exam = Exam(CONFIGS, None, limit=40)
    exam.settings.update(dialogues=500, spliced_lines={"en": 50, "zh": 50}, alphabet_lines=10)
    return exam


def test_questions_were_never_in_training(exam):
    asked = exam.dialogues(200)
    assert len(asked) == 40 and len({one.question for one in asked}) >= 30
    trained = {plain(t.text) for one in exam.data.dialogues() if one.split == "train" for t in one.dialogue.turns}
    assert trained <= exam.trained_texts and not trained & {plain(one.question) for one in asked}
    assert [one.turns for one in small().dialogues(200)] == [one.turns for one in asked]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sentences_are_of_one_language(exam, language):
    texts = exam.sentences(10, language)
    assert len(set(texts)) == 10 and all(text.isascii() == (language == "en") for text in texts)


def write_set(folder, rows):
    folder.mkdir(parents=True)
    lines = ["id\tfile\ttext\tspeaker\tlang\tsplit\tseconds"]
    for name, split in rows:
        write_audio(folder / f"{name}.wav", Audio(np.zeros(16000 * 9, np.float32), 16000))
        lines.append(f"{name}\t{name}.wav\t\t{name}\ten\t{split}\t9.0")
    (folder / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_stranger_has_no_training_clip_in_any_set(tmp_path):
    exam = Exam(CONFIGS, tmp_path)
    exam.settings.update(recorded=["one", "two"], test_share={})
    write_set(tmp_path / "one", [("ann", "train"), ("bob", "test")])
    write_set(tmp_path / "two", [("bob", "train"), ("eve", "test")])
    [found] = exam.strangers(10)
    assert found.speaker == "two/eve" and found.text is None and found.part == "two"
    assert found.audio.seconds == pytest.approx(6.0) and found.again.seconds == pytest.approx(3.0)


def test_the_store_makes_a_sound_once(tmp_path):
    made = []

    def make(places):
        made.append(places)
        return [None if i == 2 else Take(Audio(np.full(1600, i / 10, np.float32), 16000), {"n": i}) for i in places]

    store = Store(tmp_path)
    first = store.fill("kind", ["a", "b", "c"], make)
    again = store.fill("kind", ["b", "c", "a"], make)
    assert made == [[0, 1, 2], [1]] and first[2] is None
    assert again[0].notes["n"] == 1 and again[0].audio.samples[0] == pytest.approx(0.1, abs=1e-4)


def lengths(items):
    return [len(item) for item in items]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_results_keep_the_order_of_the_items(workers, tmp_path):
    crew = Crew(Setup(tmp_path), workers)
    try:
        assert crew.map(abs, [], "nothing") == []
        words = ["grey", "color", "a", "Gray", "b"]
        work = lengths if workers == 0 else list  # a process of its own cannot import a test
        wanted = lengths(words) if workers == 0 else words
        assert crew.map(work, words, "work", 2) == wanted
    finally:
        crew.close()


def test_an_engine_has_the_precision_that_is_asked_for(tiny):
    prepare(Setup(tiny, precision="int8"))
    try:
        first = engine().lm.model.layers[0]
        assert first.qkv.packed.precision == "int8" and engine().tts.lm.model.layers[0].down.packed.precision == "int8"
    finally:
        engine.cache_clear()


def test_a_part_is_not_run_twice(tmp_path, monkeypatch, exam):
    calls = []
    monkeypatch.setitem(PARTS, "asr", lambda desk: calls.append(1) or [figure("a", 0.1, 1)])
    crew = Crew(Setup(tmp_path), 0)
    for again in (False, False, True):
        results = Results.open(tmp_path / "r.json", Run("x", "aa", 1, 40, {}))
        evaluate(Desk(exam, crew, Store(tmp_path), "aa"), results, ["asr"], again)
    assert len(calls) == 2


def test_the_script_says_what_is_wrong(tmp_path):
    assert "unknown part 'nose'" in run_script("evaluate.py", "--parts", "nose").err
    assert "--limit 0" in run_script("evaluate.py", "--limit", "0").err
