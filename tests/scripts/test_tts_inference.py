"""The whole command on a random-weight checkpoint: what it writes, what it prints, how it refuses."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stepaudio.tts.style import HUMMING
from tokenizer.audio import Audio, read_audio, write_audio
from tokenizer.errors import run

REPO = Path(__file__).resolve().parents[2]
SENTENCE = "今天天气很好，我们一起去公园散步吧。"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache of voice prompts and one thread, which is quicker for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("cache")
    torch.set_num_threads(threads)


@pytest.fixture
def command(tiny, cache, tmp_path, monkeypatch, capsys):
    """Runs the script on the tiny checkpoint; gives the exit code, its standard output and its errors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    main = runpy.run_path(str(REPO / "scripts" / "tts_inference.py"))["main"]

    def call(*options, out=tmp_path / "out", attempts=1):
        fixed = ["--model-path", tiny, "--output-path", out, "--device", "cpu", "--max-attempts", attempts]
        monkeypatch.setattr(sys, "argv", ["tts_inference.py", *map(str, [*fixed, *options])])
        with pytest.raises(SystemExit) as stopped:
            run(main)
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def test_text_with_tags_as_json(command, tmp_path):
    code, output, _ = command(
        "--text", "（四川话）（快速1）" + SENTENCE, "--speaker", "Tingting", "--seed", 3, "--json", attempts=4
    )
    row = json.loads(output)
    assert (code, row["id"], row["seed"], row["error"]) == (0, "output_tts", 3, None)
    audio = read_audio(tmp_path / "out" / "output_tts.wav")
    assert audio.sample_rate == 22050
    assert audio.seconds == pytest.approx(row["seconds"], abs=0.001)


def test_same_seed_same_bytes_and_speed(command, tmp_path):
    def speak(name, *options):
        assert command("--text", SENTENCE, *options, out=tmp_path / name)[0] == 0
        return tmp_path / name / "output_tts.wav"

    first, second = speak("a", "--seed", 1), speak("b", "--seed", 1)
    assert first.read_bytes() == second.read_bytes()
    fast = speak("c", "--seed", 1, "--speed", 2, "--volume", 0.5)
    assert read_audio(fast).seconds == pytest.approx(read_audio(first).seconds / 2, abs=0.001)


def test_without_a_text_it_speaks_the_examples(command, tmp_path):
    code, output, _ = command()
    assert code == 0
    names = {"output_tts", "output_rap", "output_humming", "output_clone"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == names
    assert len(output.splitlines()) == 4


def test_clone_of_a_recording_and_long_text(command, golden, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(("Dr. Li walked 3.5 miles along the river, and then she rested. " * 40)[:2000], encoding="utf-8")
    wav = golden / "wavs" / "clip1_16k.wav"
    code, output, _ = command(
        "--text-file", text, "--prompt-wav", wav, "--prompt-text", "hello", "--json", "--batch-size", 32
    )
    row = json.loads(output)
    assert (code, row["id"]) == (0, "output_clone")
    assert row["seconds"] > 5


def test_jsonl_with_a_clone_an_error_and_a_second_run(command, golden, tmp_path):
    clone = {"speaker": "me", "prompt_text": "hi", "wav_path": str(golden / "wavs" / "clip0_22k.wav")}
    rows = [
        {"id": "a", "text": "你好。", "speaker": "Tingting"},
        {"id": "b", "text": "（RAP）一步两步。", "clone": clone},
        {"id": "c", "text": "！！"},
        {"id": "d", "text": "x", "clone": {**clone, "wav_path": "none.wav"}},
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps(row) for row in rows))
    code, output, errors = command("--input-jsonl", jobs, "--json")
    results = [json.loads(line) for line in output.splitlines()]
    assert (code, [row["id"] for row in results]) == (1, ["a", "b", "c", "d"])
    assert [row["error"] is None for row in results] == [True, True, False, False]
    assert Path(results[0]["path"]).is_file()
    assert "100%" in errors
    jobs.write_text("\n".join(json.dumps(row) for row in rows[:2]))
    before = Path(results[0]["path"]).stat().st_mtime_ns
    assert command("--input-jsonl", jobs)[0] == 0
    assert Path(results[0]["path"]).stat().st_mtime_ns == before


def test_a_batch_gives_the_same_bytes_as_single_calls(command, tmp_path):
    texts = {"a": "你好，今天天气很好。", "b": "Hello there, how are you?", "c": "（RAP）一步两步往前走。"}
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    code, _, errors = command("--input-jsonl", jobs, attempts=4)
    assert code == 0, errors
    for name, text in texts.items():
        command("--text", text, out=tmp_path / name, attempts=4)
        alone = tmp_path / name / "output_tts.wav"
        assert alone.read_bytes() == (tmp_path / "out" / f"{name}.wav").read_bytes()


def test_list_speakers(command):
    assert command("--list-speakers") == (0, f"Tingting (RAP) ({HUMMING})\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "the text is empty"),
        (["--text", "……"], "nothing to say"),
        (["--text", "（RAP）"], "only style tags"),
        (["--text", "a" * 100_000], "at most 20,000"),
        (["--text", "a\x07b"], "control character"),
        (["--text", "a\udc80b"], "surrogate"),
        (["--text", "（高兴9）x"], "did you mean"),
        (["--text", "x", "--speaker", "Tinting"], "known: Tingting"),
        (["--text", "x", "--speed", "9"], "speed 9.0 is outside"),
        (["--text", "x", "--seed", "-1"], "seed -1"),
        (["--text", "x", "--temperature", "-1"], "temperature -1.0"),
        (["--text", "x", "--batch-size", "0"], "batch_size 0"),
        (["--text", "x", "--text-file", "y"], "not both"),
        (["--text-file", "none.txt"], "none.txt"),
        (["--text", "x", "--prompt-wav", "a.wav"], "belong together"),
        (["--text", "x", "--prompt-wav", "none.wav", "--prompt-text", "x"], "none.wav does not exist"),
        (["--text", "x", "--prompt-wav", "{short}", "--prompt-text", "x"], "lasts 0.20 s"),
        (["--text", "x", "--prompt-wav", "{silent}", "--prompt-text", "x"], "is silent"),
        (["--text", "x", "--prompt-wav", "{long}", "--prompt-text", "x"], "lasts 600.00 s"),
        (["--text", "x", "--speaker-json", "none.json"], "none.json does not exist"),
        (["--input-jsonl", "{jobs}"], "line 1: broken JSON"),
        (["--text", "x", "--device", "tpu9"], "tpu9"),
    ],
)
def test_bad_input_is_refused_in_one_or_two_lines(command, tmp_path, options, message):
    for name, seconds, level in (("short", 0.2, 0.3), ("silent", 3, 0), ("long", 600, 0.3)):
        if f"{{{name}}}" in options:
            samples = np.full(int(seconds * 8000), level, np.float32)
            write_audio(tmp_path / f"{name}.wav", Audio(samples, 8000))
    (tmp_path / "jobs.jsonl").write_text('{"id": "a", "text": ')
    files = {"{jobs}": "jobs.jsonl", "{short}": "short.wav", "{silent}": "silent.wav", "{long}": "long.wav"}
    code, output, errors = command(*(str(tmp_path / files[item]) if item in files else item for item in options))
    report = [line for line in errors.splitlines() if line.startswith("error:")]
    assert (code, output, len(report)) == (2, "", 1)
    assert message in report[0]
    assert not list((tmp_path / "out").glob("*.wav"))
