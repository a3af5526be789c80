"""The whole command on a random-weight checkpoint: what it writes, what it prints, how it resumes and refuses."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from stepaudio.chat.engine import ChatRequest, StepAudio
from stepaudio.chat.offline import read_items, run_items
from stepaudio.lm.vocab import Vocab
from tests.lm.fake import FakeLM
from tokenizer.audio import read_audio
from tokenizer.errors import RequestError, run

REPO = Path(__file__).resolve().parents[2]
KEYS = {"id", "input", "text", "audio", "seconds", "times", "stop", "seed", "calls", "problems", "error"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(tiny, cache, tmp_path, monkeypatch, capsys):
    """Runs the script on the tiny checkpoint; gives the exit code, its rows (with --json) and its errors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    main = runpy.run_path(str(REPO / "scripts" / "offline_inference.py"))["main"]

    def call(*options, out=tmp_path / "out", json_rows=True):
        fixed = ["--model-path", tiny, "--output-dir", out, "--device", "cpu", "--max-new-tokens", 6]
        fixed += ["--json"] if json_rows else []
        monkeypatch.setattr(sys, "argv", ["offline_inference.py", *map(str, [*fixed, *options])])
        with pytest.raises(SystemExit) as stopped:
            run(main)
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()] if json_rows else captured.out
        return stopped.value.code, rows, captured.err

    return call


@pytest.fixture
def wavs(golden):
    return golden / "wavs"


@pytest.fixture
def script_lm(tiny, monkeypatch):
    """Puts a model in place of the chat model that says what it is told to, and remembers its prompts."""
    vocab = Vocab.from_file(tiny / "Step-Audio-Chat")

    def use(*answers):
        scripts = iter([vocab.encode(answer, allow_special=True, bos=False, prefix=False) for answer in answers])
        lm = FakeLM(lambda prompt: next(scripts))
        monkeypatch.setattr("stepaudio.chat.engine.open_lm", lambda *args, **options: lm)
        lm.vocab = vocab
        return lm

    return use


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_two_example_turns(command, tmp_path):
    code, rows, _ = command()
    assert code == 0 and [row["id"] for row in rows] == ["output_e2e_tqta", "output_e2e_aqta"]
    assert rows[1]["input"] == rows[0]["audio"] == str(tmp_path / "out" / "output_e2e_tqta.wav")
    for row in rows:
        assert set(row) == KEYS and row["error"] is None
        audio = read_audio(row["audio"])
        assert audio.sample_rate == 22_050 and audio.seconds == pytest.approx(row["seconds"], abs=1e-3)
        assert {"listen", "first_token", "generate", "speak", "total"} <= set(row["times"])


def test_same_seed_same_bytes_and_a_cloned_voice(command, wavs, tmp_path):
    clone = ["--prompt-wav", wavs / "clip1_16k.wav", "--prompt-text", "hello"]
    runs = [("a", []), ("b", []), ("c", ["--seed", 5]), ("d", clone), ("e", ["--speed", 2, "--volume", 0.5])]
    sounds = {}
    for name, options in runs:
        code, [row], _ = command("--text", "你好", *options, out=tmp_path / name)
        assert code == 0
        sounds[name] = Path(row["audio"]).read_bytes()
    assert sounds["a"] == sounds["b"]
    assert len({*sounds.values()}) == 4


def test_printed_for_people(command, wavs):
    code, output, _ = command("--input", wavs / "clip1_16k.wav", "--text-only", json_rows=False)
    assert code == 0 and output.startswith("clip1_16k: ") and "error" not in output


def test_folder_and_its_resumption(command, wavs, tmp_path, script_lm):
    folder = tmp_path / "in"
    shutil.copytree(wavs, folder)
    (folder / "broken.wav").write_bytes(b"no sound")
    (folder / "notes.txt").write_text("x")
    names = ["broken", "clip0_22k", "clip1_16k", "clip2_48k_stereo"]
    lm = script_lm("one", "two", "three")
    code, rows, _ = command("--input", folder, "--text-only")
    assert (code, [row["id"] for row in rows]) == (1, names)
    assert "broken.wav" in rows[0]["error"] and [row["text"] for row in rows[1:]] == ["one", "two", "three"]
    lm = script_lm("four", "five")
    shutil.copy(wavs / "clip1_16k.wav", folder / "broken.wav")
    log = tmp_path / "out" / "results.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if '"clip1_16k"' not in line]
    torn = next(line for line in log.read_text().splitlines() if '"clip1_16k"' in line)[:30]
    log.write_text("".join(lines) + torn)
    code, rows, _ = command("--input", folder, "--text-only")
    assert code == 0 and {row["id"]: row["text"] for row in rows} == dict(zip(names, ["four", "one", "five", "three"]))
    assert len(lm.calls) == 2
    assert sorted(json.loads(line)["id"] for line in log.read_text().splitlines()) == names


def test_a_file_name_that_is_no_utf_8_spoils_nothing(command, wavs, tmp_path, script_lm):
    script_lm("one", "two")
    (tmp_path / "in").mkdir()
    for name in (b"a\xff.wav", b"b.wav"):
        shutil.copy(wavs / "clip1_16k.wav", tmp_path / "in" / os.fsdecode(name))
    _, rows, _ = command("--input", tmp_path / "in", "--text-only")
    assert [row["id"] for row in rows] == ["a", "b"] and rows[1]["error"] is None


def test_jsonl_rows_of_every_kind(command, wavs, tmp_path, script_lm):
    shutil.copy(wavs / "clip1_16k.wav", tmp_path / "near.wav")
    turns = [{"role": "user", "content": {"type": "audio", "audio": "near.wav"}}]
    rows = [
        {"id": "words", "text": "你好", "seed": 3},
        {"id": "sound", "audio": "near.wav", "system": "短"},
        {"id": "turns", "messages": turns},
        {"id": "lost", "audio": "nowhere.wav"},
        {"id": "role", "messages": [{"role": "robot", "content": "x"}]},
        {"id": "blank", "text": "  "},
        {"id": "half", "text": "a\ud800"},
    ]
    lm = script_lm("1", "2", "3")
    path = jsonl(tmp_path / "jobs.jsonl", *rows)
    code, found, _ = command("--input", path, "--text-only", "--system", "长")
    assert code == 1
    errors = {row["id"]: row["error"] for row in found}
    assert [errors[name] for name in ("words", "sound", "turns")] == [None] * 3
    assert "nowhere.wav does not exist" in errors["lost"]
    assert "unknown role 'robot'" in errors["role"]
    assert "empty" in errors["blank"] and "surrogate" in errors["half"]
    systems = [lm.vocab.decode(prompt[: prompt.index(lm.vocab.eot)]) for prompt, _ in lm.calls]
    assert ["长" in systems[0], "短" in systems[1], "长" in systems[1], "长" in systems[2]] == [True, True, False, True]
    assert [params.seed for _, params in lm.calls] == [3, 0, 0]


def test_sound_files_are_made_once(command, tmp_path):
    path = jsonl(tmp_path / "j.jsonl", {"id": "a", "text": "你好"}, {"id": "b", "text": "你好", "speaker": "Nobody"})
    code, rows, _ = command("--input", path)
    assert code == 1 and "unknown speaker 'Nobody'" in rows[1]["error"]
    before = (tmp_path / "out" / "a.wav").stat()
    code, again, _ = command("--input", path)
    assert again[0] == rows[0]
    assert (tmp_path / "out" / "a.wav").stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".results.lock", "a.wav", "results.jsonl"]


def test_asr_of_a_file_a_folder_and_rows(command, wavs, tmp_path):
    code, [row], _ = command("--task", "asr", "--input", wavs / "clip1_16k.wav")
    assert code == 0 and row["audio"] is None and row["stop"] is None
    code, rows, _ = command("--task", "asr", "--input", wavs, "--batch-size", 2, out=tmp_path / "asr")
    assert code == 0 and rows[1]["text"] == row["text"]
    path = jsonl(
        tmp_path / "j.jsonl",
        {"id": "x", "audio": str(wavs / "clip1_16k.wav")},
        {"id": "y", "text": "no sound"},
        {"id": "z", "audio": "gone.wav"},
    )
    code, rows, _ = command("--task", "asr", "--input", path)
    assert code == 1 and rows[0]["text"] == row["text"]
    assert "no sound to write down" in rows[1]["error"] and "gone.wav" in rows[2]["error"]
    assert not list((tmp_path / "asr").glob("*.wav"))


def test_history_of_six_turns_with_sound(command, wavs, tmp_path, script_lm):
    shutil.copy(wavs / "clip1_16k.wav", tmp_path / "first.wav")
    sound = {"type": "audio", "audio": "first.wav"}
    history = [
        {"role": "system", "content": "短"},
        {"role": "user", "content": {**sound, "transcript": "你叫什么"}},
        {"role": "assistant", "content": "我叫小明"},
        {"role": "user", "content": [{"type": "text", "text": "听"}, sound]},
        {"role": "assistant", "content": {"type": "text", "text": "好"}},
        {"role": "user", "content": "再来"},
    ]
    (tmp_path / "history.json").write_text(json.dumps(history))
    lm = script_lm("好")
    options = ["--history", tmp_path / "history.json", "--input", wavs / "clip0_22k.wav", "--text-only"]
    code, [row], _ = command(*options, "--prompt", "demo")
    [(prompt, _)] = lm.calls
    assert (code, row["text"]) == (0, "好")
    assert prompt.count(lm.vocab.bot) == len(history) + 2
    assert "适配" in lm.vocab.decode(prompt[: prompt.index(lm.vocab.eot)])
    assert "你叫什么" in lm.vocab.decode(prompt)


def test_a_tool_is_called_and_its_answer_spoken(command, tmp_path, script_lm):
    (tmp_path / "tools.py").write_text(
        "from stepaudio.chat.tools import Tool\n"
        "schema = {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a']}\n"
        "TOOLS = [Tool('double', 'Doubles a number', schema, lambda a: 2 * a)]\n"
    )
    script_lm('<|CALL_START|>{"name": "double", "arguments": {"a": 21}}<|CALL_END|>', "42")
    code, [row], _ = command("--text", "21?", "--tools", tmp_path / "tools.py", "--max-new-tokens", 200)
    assert (code, row["text"], row["problems"]) == (0, "42", [])
    assert read_audio(row["audio"]).seconds > 0
    [call] = row["calls"]
    assert (call["name"], call["arguments"], call["result"], call["error"]) == ("double", {"a": 21}, "42", None)


def test_text_only_never_loads_the_voice(command, tiny, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "Step-Audio-Chat").symlink_to(tiny / "Step-Audio-Chat")
    code, [row], _ = command("--text", "你好", "--text-only", "--model-path", root)
    assert (code, row["audio"], row["error"]) == (0, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "empty"),
        (["--text", "a\x07b"], "control character"),
        (["--text", "字" * 100_000, "--text-only"], "tokens over|over the"),
        (["--text", "a", "--input", "b.wav"], "either --text or --input"),
        (["--text", "a", "--speaker", "Nobody"], "unknown speaker 'Nobody'.*known: "),
        (["--text", "a", "--speed", "9"], "speed 9.0 is outside"),
        (["--text", "a", "--seed", "-1"], "seed -1"),
        (["--text", "a", "--top-p", "7", "--text-only"], "top_p"),
        (["--text", "a", "--prompt-text", "x"], "belong together"),
        (["--text", "a", "--prompt-text", "x", "--prompt-wav", "no.wav"], "no.wav does not exist"),
        (["--text", "a", "--system", "x", "--prompt", "demo"], "either --system or --prompt"),
        (["--text", "a", "--prompt", "dem"], "unknown prompt 'dem'"),
        (["--text", "a", "--prompt", "translate", "English"], "FIELD=VALUE"),
        (["--text", "a", "--tools", "none.py"], "none.py does not exist"),
        (["--text", "a", "--tools", "empty.py"], "must define TOOLS"),
        (["--text", "a", "--history", "none.json"], "cannot read none.json"),
        (["--text", "a", "--history", "broken.json"], "cannot read broken.json"),
        (["--text", "a", "--history", "role.json"], "role.json: message 1: unknown role 'robot'"),
        (["--text", "a", "--history", "lost.json"], "lost.wav does not exist"),
        (["--input", "none.wav"], "none.wav does not exist"),
        (["--input", "empty.py"], "empty.py is"),
        (["--input", "nothing"], "holds no sound files"),
        (["--input", "none.jsonl"], "cannot read none.jsonl"),
        (["--input", "broken.jsonl"], "line 2: broken JSON"),
        (["--input", "escape.jsonl"], "no file name"),
        (["--input", "two.jsonl"], "give one of 'text', 'audio' and 'messages', found text, audio"),
        (["--input", "kind.jsonl"], "'messages' must be a JSON list"),
        (["--input", "field.jsonl"], "unknown field 'txet'"),
        (["--task", "asr"], "--task asr needs --input"),
        (["--text", "a", "--batch-size", "0"], "batch_size 0"),
        (["--text", "a", "--load-in-8bit"], "pip install bitsandbytes"),
        (["--text", "a", "--dtype", "int4"], "--dtype 'int4' is unknown"),
        (["--text", "a", "--model-path", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_requests_end_in_one_line(command, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "role.json").write_text('[{"role": "robot", "content": "x"}]')
    (tmp_path / "lost.json").write_text('[{"role": "user", "content": {"type": "audio", "audio": "lost.wav"}}]')
    jsonl(tmp_path / "broken.jsonl", {"id": "a", "text": "x"}, '{"id": ')
    jsonl(tmp_path / "escape.jsonl", {"id": "../a", "text": "x"})
    jsonl(tmp_path / "two.jsonl", {"id": "a", "text": "x", "audio": "y.wav"})
    jsonl(tmp_path / "kind.jsonl", {"id": "a", "messages": "x"})
    jsonl(tmp_path / "field.jsonl", {"id": "a", "txet": "x"})
    code, output, errors = command(*options, json_rows=False)
    assert code == 2 and output == "", errors
    error = errors[errors.index("error: ") :]
    assert "Traceback" not in errors and len(error.strip().splitlines()) <= 2
    with pytest.raises(RequestError, match=message):
        raise RequestError(error)
    assert not list((tmp_path / "out").glob("*.wav"))


def test_batches_report_as_they_end_and_every_option_counts(tiny, wavs, tmp_path, script_lm):
    script_lm("a", "b", "c")
    engine = StepAudio.from_dir(tiny, text_only=True)
    items = read_items(wavs, ChatRequest([]), "asr")
    seen = []
    results = run_items(engine, items, tmp_path, batch_size=2, report=seen.append, progress=False)
    assert {result.text for result in seen[:2]} == {"a", "b"} and seen[2].text == "c"
    assert results == seen and [result.id for result in seen] == [item.id for item in items]
    changed = read_items(wavs, ChatRequest([], seed=1), "asr")
    assert {item.digest for item in items}.isdisjoint(item.digest for item in changed)
    assert len({item.digest for item in read_items(wavs, ChatRequest([]))} | {item.digest for item in items}) == 6
