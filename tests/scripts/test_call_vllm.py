"""The vLLM client against a small completion server on this machine."""

import runpy
import sys
from pathlib import Path

import pytest

from stepaudio.lm.vocab import Vocab
from tests.lm.test_remote import Server
from tokenizer.audio import read_audio
from tokenizer.errors import run

REPO = Path(__file__).resolve().parents[2]
ANSWER = "你好 hello"


@pytest.fixture(scope="module")
def vocab(tiny):
    return Vocab.from_file(tiny / "Step-Audio-Chat")


@pytest.fixture
def server(vocab):
    server = Server()
    server.models = {"data": [{"id": "Step-Audio-Chat", "max_model_len": 4096}]}
    server.script = lambda body: [*vocab.encode(ANSWER, bos=False, prefix=False), vocab.eot]
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main = runpy.run_path(str(REPO / "scripts" / "call_vllm_chat.py"))["main"]

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["call_vllm_chat.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run(main)
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run_main


def test_words_in_words_out_with_a_tokenizer_alone(server, call, tiny, vocab):
    folder = tiny / "Step-Audio-Chat"
    options = ["--system", "短", "--seed", 7, "--temperature", 0.5, "--max-new-tokens", 9]
    code, output, _ = call("--url", f"{server.url}/v1", "--tokenizer", folder, "--text", "你好", *options)
    assert (code, output) == (0, ANSWER + "\n")
    [body] = server.bodies
    template = "<|BOT|>system\n短<|EOT|><|BOT|>human\n你好<|EOT|><|BOT|>assistant\n"
    assert body["prompt"] == vocab.encode(template, allow_special=True)
    assert (body["temperature"], body["max_tokens"], body["seed"], body["top_p"]) == (0.5, 9, 7, 0.9)
    assert (body["model"], body["stop_token_ids"]) == ("Step-Audio-Chat", [vocab.eot])


def test_sound_in_and_sound_out(server, call, tiny, vocab, golden, tmp_path):
    clip = golden / "wavs" / "clip1_16k.wav"
    out = tmp_path / "answer.wav"
    code, output, _ = call("--url", server.url, "--model-path", tiny, "--audio", clip, "--output", out)
    assert (code, output) == (0, ANSWER + "\n")
    first, end = vocab.audio_range
    assert sum(first <= index < end for index in server.bodies[0]["prompt"]) > 50
    assert read_audio(out).sample_rate == 22_050


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --text or --audio"),
        (["--text", "a", "--audio", "b.wav"], "either --text or --audio"),
        (["--text", "a", "--model", "other"], "has no model 'other', only Step-Audio-Chat"),
        (["--text", "a", "--tokenizer", "/nowhere"], "/nowhere is missing"),
        (["--text", "a", "--output", "a.doc"], "unknown format '.doc'"),
        (["--audio", "/nowhere.wav"], "/nowhere.wav does not exist"),
        (["--text", "\x00"], "control character"),
        (["--text", "a" * 9000], "over the"),
        (["--text", "a", "--temperature", "-1"], "temperature"),
    ],
)
def test_bad_requests_end_in_one_line(server, call, tiny, arguments, message):
    code, _, errors = call("--url", server.url, "--model-path", tiny, *arguments)
    assert code == 2 and message in errors and "Traceback" not in errors
    assert server.bodies == []


def test_a_server_that_is_down_and_one_that_fails(server, call, tiny):
    fixed = ["--model-path", tiny, "--text", "a"]
    code, _, errors = call("--url", "http://127.0.0.1:9/v1", *fixed)
    assert code == 2 and "http://127.0.0.1:9 cannot be reached" in errors
    assert call("--url", "localhost", *fixed)[0] == 2
    server.script = lambda body: (500, '{"error": {"message": "out of blocks"}}')
    code, _, errors = call("--url", server.url, *fixed)
    assert code == 2 and "out of blocks" in errors
