import json
import multiprocessing
import random
import time

import numpy as np
import pytest

from stepaudio.tts import batch
from stepaudio.tts.batch import read_jobs, run_jobs
from stepaudio.tts.speech import Piece, Speech, TTSRequest
from tokenizer.audio import Audio, read_audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

DEFAULTS = TTSRequest("", speaker="Ann", seed=4)


class FakeEngine:
    """Speaks the number in the text as a level; fails where the text says so."""

    def __init__(self, pause=0.0):
        self.pause, self.batches = pause, []

    def synthesize_batch(self, requests):
        self.batches.append([request.text for request in requests])
        if any("crash" in request.text for request in requests):
            raise ValueError("broken")
        return [self._speak(request) for request in requests]

    def _speak(self, request):
        time.sleep(self.pause)
        if "bad" in request.text:
            return RequestError("bad text")
        level = int(request.text.split()[-1]) / 1000
        return Speech(Audio(np.full(2000, level, np.float32), 8000), (Piece(request.text, 0, AudioCodes([]), (), 1),))


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def jobs(tmp_path):
    rows = [{"id": f"item{i}", "text": "word " * (i % 5) + str(i)} for i in range(12)]
    return read_jobs(jsonl(tmp_path / "jobs.jsonl", *rows), DEFAULTS)


def test_rows_take_what_they_leave_out_from_the_defaults(tmp_path):
    clone = {"speaker": "me", "prompt_text": "hi", "wav_path": "a.wav"}
    (tmp_path / "a.wav").write_text("")
    path = jsonl(
        tmp_path / "j.jsonl",
        {"id": "a", "text": "x"},
        "\n",
        {"id": 7, "text": "line\u2028two", "speaker": "Bob", "seed": 9, "speed": 1.5, "volume": 2},
        {"id": "好 c", "text": "x", "clone": clone},
    )
    first, second, third = read_jobs(path, DEFAULTS)
    assert (first.id, first.request) == ("a", TTSRequest("x", speaker="Ann", seed=4))
    assert (second.id, second.request) == ("7", TTSRequest("line\u2028two", speaker="Bob", seed=9, speed=1.5, volume=2))
    assert third.request.speaker is None
    assert third.request.clone == {**clone, "wav_path": str(tmp_path / "a.wav")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "text": ', "line 2: broken JSON"),
        ("[1]", "line 2: a row must be an object"),
        ('{"id": "b"}', "line 2: 'text' is missing"),
        ('{"text": "x"}', "line 2: 'id' is missing"),
        ('{"id": "b", "text": "x", "spaeker": "A"}', "unknown field 'spaeker'"),
        ('{"id": "a", "text": "x"}', "'a' comes twice"),
        ('{"id": "../b", "text": "x"}', "no file name"),
        ('{"id": "a/b", "text": "x"}', "no file name"),
        ('{"id": "..", "text": "x"}', "no file name"),
        ('{"id": "b\\u0000", "text": "x"}', "no file name"),
        ('{"id": "' + "b" * 300 + '", "text": "x"}', "no file name"),
        ('{"id": "b", "text": "x", "speaker": 5}', "'speaker' must be a string"),
        ('{"id": "b", "text": "x", "clone": "a.wav"}', "'clone' must be an object"),
        ('{"id": "b", "text": "x", "speaker": "A", "clone": {}}', "not both"),
    ],
)
def test_a_bad_line_is_named_before_any_work(tmp_path, line, message):
    with pytest.raises(RequestError, match=message):
        read_jobs(jsonl(tmp_path / "j.jsonl", {"id": "a", "text": "x"}, line), DEFAULTS)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(RequestError, match="cannot read"):
        read_jobs(tmp_path / "none.jsonl", DEFAULTS)
    with pytest.raises(RequestError, match="no jobs"):
        read_jobs(jsonl(tmp_path / "e.jsonl", "\n"), DEFAULTS)


def test_results_and_length_bucketed_batches(tmp_path, jobs):
    engine, out = FakeEngine(), tmp_path / "out"
    results = run_jobs(jobs, engine, out, batch_size=5, progress=False)
    assert [result.id for result in results] == [job.id for job in jobs]
    assert {row["id"] for row in rows_of(out)} == {job.id for job in jobs}
    assert [len(texts) for texts in engine.batches] == [5, 5, 2]
    lengths = [len(text) for texts in engine.batches for text in texts]
    assert lengths == sorted(lengths)
    row = next(row for row in rows_of(out) if row["id"] == "item3")
    assert (row["path"], row["seconds"], row["seed"], row["error"]) == ("item3.wav", 0.25, 4, None)
    assert row["rtf"] > 0
    assert read_audio(out / "item3.wav").samples[0] == pytest.approx(0.003, abs=1e-4)


def test_a_second_run_does_nothing_and_keeps_rows_of_other_jobs(tmp_path, jobs):
    out = tmp_path / "out"
    run_jobs(jobs[:8], FakeEngine(), out, progress=False)
    again = FakeEngine()
    run_jobs(jobs[4:], again, out, progress=False)
    assert sorted(text for texts in again.batches for text in texts) == sorted(job.request.text for job in jobs[8:])
    assert len(rows_of(out)) == len(jobs)
    before = (out / "results.jsonl").read_text()
    run_jobs(jobs, FakeEngine(), out, progress=False)
    assert (out / "results.jsonl").read_text() == before


def test_torn_rows_lost_sounds_changed_jobs_and_leftovers(tmp_path, jobs):
    out = tmp_path / "out"
    run_jobs(jobs, FakeEngine(), out, progress=False)
    log = out / "results.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    torn = json.loads(lines[-1])["id"]
    log.write_text("".join(lines[:-1]) + lines[-1][:20])
    (out / "item1.wav").unlink()
    (out / ".item5-ab12_xyz.wav").write_bytes(b"RIFF")
    changed = [batch.Job("item2", TTSRequest("other 2", speaker="Ann"))]
    engine = FakeEngine()
    run_jobs([*changed, *(job for job in jobs if job.id != "item2")], engine, out, progress=False)
    spoken = {text.split()[-1] for texts in engine.batches for text in texts}
    assert spoken == {"1", "2", torn.removeprefix("item")}
    assert sorted(row["id"] for row in rows_of(out)) == sorted(job.id for job in jobs)
    assert not list(out.glob(".item*"))


def test_errors_are_rows_and_are_tried_again(tmp_path):
    rows = [{"id": "a", "text": "1"}, {"id": "b", "text": "bad 2"}, {"id": "c", "text": "crash 3"}]
    jobs = read_jobs(jsonl(tmp_path / "j.jsonl", *rows), DEFAULTS)
    for _ in range(2):
        good, bad, crashed = run_jobs(jobs, FakeEngine(), tmp_path / "out", progress=False)
        assert (good.error, bad.error, crashed.error) == (None, "bad text", "ValueError('broken')")
        assert sorted(row["id"] for row in rows_of(tmp_path / "out")) == ["a", "b", "c"]
    assert not (tmp_path / "out" / "b.wav").exists()


def test_two_runs_in_one_folder_are_refused(tmp_path, jobs):
    with batch.lock(tmp_path), pytest.raises(RequestError, match="another run"):
        run_jobs(jobs, FakeEngine(), tmp_path, progress=False)


def test_killed_twenty_times(tmp_path):
    rows = [{"id": f"n{i}", "text": f"{'word ' * (i % 7)}{i}"} for i in range(200)]
    jobs = read_jobs(jsonl(tmp_path / "j.jsonl", *rows), DEFAULTS)
    out, dice, context = tmp_path / "out", random.Random(0), multiprocessing.get_context("fork")
    unfinished = 0
    for _ in range(20):
        run = context.Process(target=run_jobs, args=(jobs, FakeEngine(0.004), out, 4, False))
        run.start()
        time.sleep(dice.uniform(0.01, 0.12))
        unfinished += run.is_alive()
        run.kill()
        run.join()
    assert unfinished > 10
    results = run_jobs(jobs, FakeEngine(), out, 4, progress=False)
    assert [result.id for result in results] == [job.id for job in jobs]
    assert sorted(row["id"] for row in rows_of(out)) == sorted(job.id for job in jobs)
    assert {path.name for path in out.iterdir()} == {f"{job.id}.wav" for job in jobs} | {
        "results.jsonl",
        ".results.lock",
    }
    for i in range(200):
        audio = read_audio(out / f"n{i}.wav")
        assert (len(audio), audio.sample_rate) == (2000, 8000)
        assert audio.samples[-1] == pytest.approx(i / 1000, abs=1e-4)
