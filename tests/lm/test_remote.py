"""The remote engine against a small completion server on this machine that checks what it is sent."""

import json
import threading
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.remote import RemoteLM
from tokenizer.errors import RequestError

PARAMS = SamplingParams(seed=11, max_new_tokens=6)


class Server:
    """Answers a request body with `script(body)`: ids, or bytes to send as they are, or (status, text)."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.script = lambda body: [7, 8, 3]
        self.models = {"data": [{"id": "step", "max_model_len": 64}, {"id": "other", "max_model_len": 9}]}
        self.tokens_per_event = 2
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(200, json.dumps(outer.models).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                reply = outer.script(body)
                if isinstance(reply, tuple):
                    self.answer(reply[0], reply[1].encode())
                elif isinstance(reply, bytes):
                    self.answer(200, reply)
                else:
                    self.answer(200, b"".join(outer.events(body, reply)))

            def answer(self, status, data):
                with suppress(BrokenPipeError):  # a client that has heard enough hangs up
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def events(self, body, ids):
        """What vLLM sends: deltas with `token_ids`, the stop id among them, and the finish reason in the last."""
        ids = ids[: body["max_tokens"]]
        stop = next((at for at, index in enumerate(ids) if index in body["stop_token_ids"]), None)
        ids, reason = (ids[: stop + 1], "stop") if stop is not None else (ids, "length")
        step = self.tokens_per_event if body["stream"] else len(ids) or 1
        parts = [ids[at : at + step] for at in range(0, len(ids), step)] or [[]]
        for at, part in enumerate(parts):
            choice = {"index": 0, "text": "x", "token_ids": part, "finish_reason": None}
            if at == len(parts) - 1:
                choice["finish_reason"] = reason
            data = json.dumps({"choices": [choice]}).encode()
            yield b"data: " + data + b"\n\n" if body["stream"] else data
        if body["stream"]:
            yield b": a comment\n\ndata: [DONE]\n\n"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def lm(server):
    return RemoteLM(server.url, "step", max_context=64, timeout=5)


def collect(tokens):
    *ids, last = tokens
    assert last.id is None
    return Completion(tuple(token.id for token in ids), last.stop)


def test_payload_and_stream(server, lm):
    params = replace(PARAMS, top_p=0.9, allowed=((5, 9),))
    assert collect(lm.stream([1, 4], params)) == Completion((7, 8), StopReason.STOP)
    assert server.bodies == [
        {
            "model": "step",
            "prompt": [1, 4],
            "max_tokens": 6,
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 0.9,
            "seed": 11,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "allowed_token_ids": [3, 5, 6, 7, 8],
        }
    ]


def test_url_with_and_without_version_and_key(server):
    for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
        assert collect(RemoteLM(url, "step", 64, api_key="k").stream([1], PARAMS)).ids == (7, 8)
    assert all(header["Authorization"] == "Bearer k" for header in server.headers)


def test_generate_sends_a_request_each(server, lm):
    server.script = lambda body: [body["prompt"][0] + 20, 3] if body["prompt"] != [5] else [6] * 9
    done = lm.generate([[1], [2], [5]], [PARAMS] * 3)
    assert done == [
        Completion((21,), StopReason.STOP),
        Completion((22,), StopReason.STOP),
        Completion((6,) * 6, StopReason.LENGTH),
    ]
    assert not any(body["stream"] for body in server.bodies)
    assert lm.generate([], []) == []


def test_stop_id_left_out_by_the_server(server, lm):
    choice = {"token_ids": [7, 8], "finish_reason": "stop"}
    server.script = lambda body: json.dumps({"choices": [choice]}).encode()
    assert lm.generate([[1]], [PARAMS]) == [Completion((7, 8), StopReason.STOP)]


def test_repetition_rule_draws_again(server, lm):
    """7 7 is forbidden within a window of 2: the second 7 goes, 9 comes instead, and a third request goes on."""
    replies = iter([[7, 7, 8, 8], [9], [5, 3]])
    server.script = lambda body: next(replies)
    params = replace(PARAMS, repetition_window=2, repetition_share=0.0)
    assert collect(lm.stream([1, 4], params)) == Completion((7, 9, 5), StopReason.STOP)
    first, again, onward = server.bodies
    assert "logit_bias" not in first and first["max_tokens"] == 6
    assert again["prompt"] == [1, 4, 7] and again["max_tokens"] == 1 and not again["stream"]
    assert again["logit_bias"] == {"7": -100.0} and again["seed"] == 12
    assert onward["prompt"] == [1, 4, 7, 9] and onward["max_tokens"] == 4 and "logit_bias" not in onward


def test_cycle_draws_again(server, lm):
    replies = iter([[10, 3], [20], [11, 21, 3]])
    server.script = lambda body: next(replies)
    params = replace(PARAMS, cycle=((10, 12), (20, 22)))
    assert lm.generate([[1]], [params]) == [Completion((10, 20, 11, 21), StopReason.STOP)]
    first, again, _ = server.bodies
    assert first["allowed_token_ids"] == [3, 10, 11, 20, 21] and first["stream"]
    assert again["allowed_token_ids"] == [20, 21]  # no stop inside a cycle


def test_last_token_drawn_again(server, lm):
    replies = iter([[10, 9], [20]])
    server.script = lambda body: next(replies)
    params = replace(PARAMS, cycle=((10, 12), (20, 22)), max_new_tokens=2)
    assert collect(lm.stream([1], params)) == Completion((10, 20), StopReason.LENGTH)


def test_server_that_ignores_the_rules(server, lm):
    server.script = lambda body: [30]
    with pytest.raises(RequestError, match="told not to: it lacks allowed_token_ids"):
        list(lm.stream([1], replace(PARAMS, cycle=((10, 12),))))


def test_loop_and_cancel(server, lm):
    server.script = lambda body: [5] * 6
    assert collect(lm.stream([1], replace(PARAMS, loop_guard=3))) == Completion((5,) * 3, StopReason.LOOP)
    seen = []
    for token in lm.stream([1], PARAMS, cancelled=lambda: len(seen) == 2):
        seen.append(token)
    assert seen[-1] == Token(None, StopReason.CANCELLED) and len(seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, "{}"), "answers 500 Internal Server Error to /v1/completions: no reason given"),
        ((404, '{"error": {"message": "The model `step` does not exist."}}'), "The model `step` does not exist."),
        ((400, '{"object": "error", "message": "too long"}'), "too long"),
        ((503, "<html>busy</html>"), "<html>busy</html>"),
        (b"data: not json\n\n", "no JSON object: b' not json"),
        (b"data: [1]\n\n", "no JSON object"),
        (b'data: {"choices": 5}\n\n', "without choices"),
        (b'data: {"error": {"message": "out of blocks"}}\n\n', "failed: out of blocks"),
        (b'data: {"choices": [{"text": "hi", "finish_reason": null}]}\n\n', "returns no token ids"),
        (b'data: {"choices": [{"token_ids": ["7"], "finish_reason": null}]}\n\n', "no numbers"),
        (b'data: {"choices": [{"token_ids": [7], "finish_reason": "abort"}]}\n\n', "ended the generation: abort"),
        (b'data: {"choices": [{"token_ids": [7], "finish_reason": null}]}\n\n', "broke off"),
        (b"", "broke off"),
    ],
)
def test_bad_answers(server, lm, reply, message):
    server.script = lambda body: reply
    with pytest.raises(RequestError) as error:
        list(lm.stream([1], PARAMS))
    assert message in str(error.value) and server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_server_that_is_down(server, lm):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(RequestError, match=rf"{server.url} cannot be reached \(Connection refused\): start it"):
        list(lm.stream([1], PARAMS))


def test_silent_server(server):
    release = threading.Event()
    server.script = lambda body: release.wait(5) and [3]
    with pytest.raises(RequestError, match=r"said nothing for 0\.2 s"):
        list(RemoteLM(server.url, "step", 64, timeout=0.2).stream([1], PARAMS))
    release.set()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", ""])
def test_bad_url(url):
    with pytest.raises(RequestError, match="must look like"):
        RemoteLM(url, "step", 64)


def test_request_is_checked_before_it_is_sent(server, lm):
    with pytest.raises(RequestError, match="2 over the context of 64"):
        lm.stream([1] * 60, PARAMS)
    with pytest.raises(RequestError, match="temperature"):
        lm.generate([[1]], [replace(PARAMS, temperature=-1)])
    with pytest.raises(RequestError, match="1 prompts need"):
        lm.generate([[1]], [])
    assert server.bodies == []


def test_connect_asks_the_server(server):
    lm = RemoteLM.connect(server.url)
    assert (lm.model, lm.max_context) == ("step", 64)
    assert RemoteLM.connect(server.url, model="other").max_context == 9
    with pytest.raises(RequestError, match="has no model 'third', only step, other"):
        RemoteLM.connect(server.url, model="third")
    server.models = {"data": []}
    with pytest.raises(RequestError, match="does not say which models"):
        RemoteLM.connect(server.url)
