"""The console command: its help, every command on the tiny checkpoint, and how it refuses."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio import cli
from stepaudio.cli import COMMANDS
from stepaudio.commands.options import spread_options
from stepaudio.tts.style import table
from tokenizer.audio import read_audio
from tokenizer.codes import AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError, run

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def stepaudio(tiny, monkeypatch, capsys):
    """Runs `stepaudio ...` on the tiny checkpoint: exit code, standard output, errors."""
    monkeypatch.setenv("STEPAUDIO_MODEL_PATH", str(tiny))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stepaudio", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run(lambda: cli.main(sys.argv[1:]))
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def clip(golden):
    return golden / "wavs" / "clip1_16k.wav"


def parser_of(name):
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    return parser


def test_the_overview_loads_no_model_code():
    probe = "import sys; from stepaudio.cli import entry\ntry: entry()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe, "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_the_console_script_is_this_one():
    assert '"stepaudio = stepaudio.cli:entry"' in (REPO / "setup.py").read_text()
    assert callable(cli.entry)


def test_no_command_and_an_unknown_one(stepaudio):
    code, output, _ = stepaudio()
    assert code == 0 and output.startswith("usage: stepaudio COMMAND")
    code, _, errors = stepaudio("speak")
    assert code == 2 and "invalid choice: 'speak'" in errors and "convert-tokenizer" in errors


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(stepaudio, name):
    code, output, _ = stepaudio(name, "--help")
    assert code == 0 and f"usage: stepaudio {name} " in output
    examples = output.split("example:\n")[1].strip().splitlines()
    for example in examples:
        program, command, *arguments = shlex.split(example.split(" > ")[0])
        assert (program, command) == ("stepaudio", name)
        parser_of(name).parse_args(arguments)


def test_no_command_takes_abbreviated_options(stepaudio):
    assert stepaudio("tokenize", "x.wav", "--see", "1")[0] == 2


def test_tokenize_in_every_form(stepaudio, tiny, clip):
    codes = DualTokenizer.from_dir(tiny / "Step-Audio-Tokenizer").encode(read_audio(clip))
    assert stepaudio("tokenize", clip)[1] == codes.to_text() + "\n"
    row = json.loads(stepaudio("tokenize", clip, "--json")[1])
    assert row["codes"] == codes.interleaved.tolist()
    assert row["text"] == codes.to_text()
    assert row["seconds"] == pytest.approx(codes.seconds, abs=1e-3)
    base = row["ids"][0] - row["codes"][0]
    assert row["ids"] == codes.to_ids(base)
    _, output, _ = stepaudio("tokenize", clip, clip, "--form", "ids")
    assert output.splitlines() == [" ".join(map(str, row["ids"]))] * 2


def test_token_ids_are_the_release_s_where_no_text_tokenizer_is(stepaudio, tiny, clip, tmp_path):
    (tmp_path / "Step-Audio-Tokenizer").symlink_to(tiny / "Step-Audio-Tokenizer")
    row = json.loads(stepaudio("tokenize", clip, "--json", "--model-path", tmp_path)[1])
    assert row["ids"][0] == 65536 + row["codes"][0]


def test_decode_takes_what_tokenize_gives(stepaudio, clip, tmp_path):
    row = json.loads(stepaudio("tokenize", clip, "--json")[1])
    (tmp_path / "codes.json").write_text(json.dumps(row))
    (tmp_path / "codes.txt").write_text(row["text"])
    sounds = []
    for given in (tmp_path / "codes.json", tmp_path / "codes.txt", row["text"]):
        out = tmp_path / f"{len(sounds)}.wav"
        code, output, _ = stepaudio("decode", given, "-o", out)
        assert code == 0 and f"from {len(row['codes'])} codes" in output
        sounds.append(out.read_bytes())
    assert sounds[0] == sounds[1] == sounds[2]
    assert read_audio(out).seconds == pytest.approx(row["seconds"], rel=0.02)


def test_decode_with_a_voice_and_music(stepaudio, clip, tmp_path):
    text = AudioCodes.merge([1, 2] * 4, [3, 4, 5] * 4).to_text()
    sounds = []
    for options in ([], ["--voice", clip], ["--music"], ["--seed", 5], ["--steps", 3]):
        out = tmp_path / f"{len(sounds)}.flac"
        assert stepaudio("decode", text, "-o", out, *options)[0] == 0
        sounds.append(out.read_bytes())
    assert len(set(sounds)) == len(sounds)


def test_codes_out_of_order_are_warned_of_and_decoded(stepaudio, tmp_path, caplog):
    code, _, _ = stepaudio("decode", "<audio_1><audio_2><audio_3><audio_1030>", "-o", tmp_path / "a.wav")
    assert code == 0 and read_audio(tmp_path / "a.wav").seconds > 0
    assert "breaks the 2:3 pattern" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "<audio_1><audio_5120>", "-o", "a.wav"], "audio code 5120 at position 1 is outside 0..5119"),
        (["decode", "<audio_1> hello", "-o", "a.wav"], "pieces only, found 'hello'"),
        (["decode", "none.json", "-o", "a.wav"], "none.json does not exist"),
        (["decode", "none.txt", "-o", "a.wav"], "cannot read none.txt"),
        (["decode", "empty.txt", "-o", "a.wav"], "empty.txt holds no codes"),
        (["decode", "<audio_1>", "-o", "a.doc"], "unknown format '.doc'"),
        (["decode", "<audio_1>", "-o", "no/folder/a.wav"], "no/folder"),
        (["tokenize", "none.wav"], "none.wav"),
        (["tokenize", "empty.txt"], "empty.txt"),
        (["transcribe", "none.wav"], "none.wav"),
        (["doctor", "--only", "chatt"], "'chatt' is unknown"),
        (["doctor", "--model-path", "nowhere"], "nowhere is not a folder"),
        (["tags", "--model-path", "x"], "unrecognized arguments"),
        (["chat", "--text", "a", "--max-memory", "lots"], "--max-memory 'lots' must look like"),
        (["bench", "encode", "--seconds", "ten"], "--seconds 'ten' must be numbers"),
        (["convert-tokenizer", "nowhere"], "nowhere is missing"),
        (["tts", "--text", ""], "the text is empty"),
    ],
)
def test_bad_requests_end_in_one_line(stepaudio, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    code, output, errors = stepaudio(*arguments)
    assert code == 2 and output == ""
    assert message in errors and "Traceback" not in errors
    assert not (tmp_path / "a.wav").exists()


def test_transcribe_one_file_and_several(stepaudio, clip):
    code, output, _ = stepaudio("transcribe", clip)
    assert code == 0
    text = output.removesuffix("\n")
    assert stepaudio("transcribe", clip, clip)[1] == f"{clip}: {text}\n" * 2
    assert json.loads(stepaudio("transcribe", clip, "--json")[1]) == {"input": str(clip), "text": text}


def test_tags_and_doctor(stepaudio):
    _, output, _ = stepaudio("tags")
    assert all(tag.name in output and tag.gloss in output for tag in table())
    code, output, _ = stepaudio("doctor", "--only", "tokenizer", "--json")
    assert (code, json.loads(output)["healthy"]) == (0, True)


def test_convert_tokenizer(stepaudio, tiny, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny / "Step-Audio-Chat", folder)
    code, output, _ = stepaudio("convert-tokenizer", folder)
    assert code == 0 and output.startswith(f"{folder / 'tokenizer.json'}\nAutoTokenizer gives the right ids")
    code, output, _ = stepaudio("convert-tokenizer", folder / "tokenizer.model", "--out", tmp_path / "other")
    assert code == 0 and (tmp_path / "other" / "tokenizer.json").is_file()


def test_bench_rows_and_file(stepaudio, tmp_path):
    out = tmp_path / "rows.json"
    options = ["--seconds", "1,2", "--repeats", "1", "--device", "cpu", "--output", out]
    code, output, _ = stepaudio("bench", "stages", *options)
    rows = [json.loads(line) for line in output.splitlines()]
    names = ["round trip, tokenize", "round trip, flow", "round trip, vocoder"]
    assert code == 0 and [row["name"] for row in rows] == names * 2
    assert [row["audio_s"] for row in rows] == [1.0] * 3 + [2.0] * 3
    content = json.loads(out.read_text())
    assert content["rows"] == rows and content["command"].startswith("stepaudio bench stages --seconds 1,2")


@pytest.mark.parametrize(
    ("device_map", "max_memory", "expected"),
    [
        (None, None, {}),
        ("balanced", None, {"device_map": "balanced"}),
        (
            None,
            "0=70GiB, cpu=200GiB",
            {"device_map": "auto", "max_memory": {0: "70GiB", "cpu": "200GiB"}},
        ),
    ],
)
def test_how_the_chat_model_is_spread(device_map, max_memory, expected):
    assert spread_options(argparse.Namespace(device_map=device_map, max_memory=max_memory)) == expected


def test_a_wrong_memory_is_named():
    with pytest.raises(RequestError, match=re.escape("--max-memory '0:70' must look like")):
        spread_options(argparse.Namespace(device_map=None, max_memory="0:70"))
