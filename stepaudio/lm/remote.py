"""A language model behind an OpenAI-compatible `/v1/completions` server that returns token ids, as vLLM does.

Knows nothing about text, prompts or sound: prompts go out as ids, ids come back (`return_token_ids`, vLLM 0.10.2 or
newer, so every vLLM with Step-1). Temperature, top-k, top-p, allowed ids, stop ids and seed are the server's work.

What such a server cannot do is watched here: the repetition rule and cycles. An id that breaks one is thrown away
with everything after it, that one id is drawn again from those allowed, and a new request goes on behind it. This has
the odds of forbidding the id beforehand, but for top-k and top-p: the server counts the forbidden id among the top.
Same seed, same ids holds as far as the server keeps it (vLLM's batch composition may change the last bits of its
logits), and they are other ids than `LocalLM` draws.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.sampling import (
    LoopGuard,
    allowed_at,
    check_params,
    check_room,
    forbidden_by_repetition,
    may_stop_at,
)
from tokenizer.errors import RequestError

MAX_PARALLEL = 64  # requests under way at once in generate()
_MAX_ID = 2**31  # the server knows its vocabulary, we do not
_FORBID = -100.0  # the strongest logit bias of the protocol
_FINISH = {"stop": StopReason.STOP, "length": StopReason.LENGTH}


class RemoteLM:
    """A `LanguageModel` over HTTP."""

    def __init__(
        self, base_url: str, model: str, max_context: int, timeout: float = 120.0, api_key: str | None = None
    ) -> None:
        """`base_url` with or without `/v1`; `timeout` is the longest silence of the server, in seconds.

        Raises RequestError for what is no URL. Nothing is sent yet.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.max_context = max_context
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        _address(self.base_url)

    @classmethod
    def connect(
        cls, base_url: str, model: str | None = None, timeout: float = 120.0, api_key: str | None = None
    ) -> RemoteLM:
        """Asks the server (`/v1/models`) for its context and, where no `model` is named, for its first model."""
        remote = cls(base_url, model or "", 0, timeout, api_key)
        with closing(remote._open("GET", "/v1/models")) as response:
            reply = remote._json(remote._guarded(response.read))
        try:
            contexts = {card["id"]: int(card["max_model_len"]) for card in reply["data"]}
            remote.model = model or next(iter(contexts))
        except (KeyError, TypeError, ValueError, StopIteration):
            raise remote._error("does not say which models it has and their max_model_len") from None
        if remote.model not in contexts:
            raise remote._error(f"has no model {remote.model!r}, only {', '.join(contexts)}")
        remote.max_context = contexts[remote.model]
        return remote

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Token]:
        """Yields tokens as they arrive; cancelling closes the connection, which ends the work on the server."""
        self._check(prompt, params)
        return self._tokens(prompt, params, cancelled, streamed=True)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Sends a request for each prompt, up to 64 at once; the server batches them."""
        if len(prompts) != len(params):
            raise RequestError(f"{len(prompts)} prompts need as many sampling params, found {len(params)}")
        for prompt, wanted in zip(prompts, params):
            self._check(prompt, wanted)
        if not prompts:
            return []
        with ThreadPoolExecutor(min(MAX_PARALLEL, len(prompts))) as pool:
            return list(pool.map(self._complete, prompts, params))

    def _complete(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        watched = bool(params.repetition_window or params.cycle or params.loop_guard)
        *tokens, last = self._tokens(prompt, params, None, streamed=watched)
        assert last.stop is not None
        return Completion(tuple(token.id for token in tokens if token.id is not None), last.stop)

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        check_params(params, _MAX_ID)
        check_room(len(prompt), params, self.max_context)

    def _tokens(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] | None, streamed: bool
    ) -> Iterator[Token]:
        """The tokens of one generation and the reason for its end, over as many requests as it takes."""
        progress, again = _Progress(prompt, params), False
        while True:
            broken = False
            body = {"model": self.model, **progress.body(again), "stream": streamed and not again}
            with closing(self._receive(body)) as received:
                for token in received:
                    broken = token.id is not None and not progress.permits(token.id)
                    if broken or (again and token.id is None):
                        break  # draw this id again; or go on behind the one that was
                    emitted, stop = progress.accept(token)
                    if emitted:
                        yield token
                        if stop is None and cancelled is not None and cancelled():
                            stop = StopReason.CANCELLED
                    if stop is not None:
                        yield Token(None, stop)
                        return
            if broken and again:
                raise self._error("draws ids that it was told not to: it lacks allowed_token_ids or logit_bias")
            again = broken

    def _receive(self, body: dict[str, Any]) -> Iterator[Token]:
        """Sends one request; yields its ids, then a token with the server's reason for the end."""
        with closing(self._open("POST", "/v1/completions", body)) as response:
            lines = self._events(response) if body["stream"] else iter([self._guarded(response.read)])
            for line in lines:
                reply = self._json(line)
                if "error" in reply:
                    raise self._error(f"failed: {_message(reply)}")
                for choice in self._choices(reply):
                    yield from map(Token, self._ids(choice))
                    if choice.get("finish_reason"):
                        stop = _FINISH.get(choice["finish_reason"])
                        if stop is None:
                            raise self._error(f"ended the generation: {choice['finish_reason']}")
                        yield Token(None, stop)
                        return
        raise self._error("broke off in the middle of an answer: look at its log")

    def _choices(self, reply: dict[str, Any]) -> list[dict[str, Any]]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._error(f"sent an answer without choices: {str(reply)[:60]}")
        return choices

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        ids = choice.get("token_ids")
        if ids is None and choice.get("text"):
            raise self._error("returns no token ids: it must know return_token_ids (vLLM 0.10.2 or newer)")
        ids = ids or []
        if not isinstance(ids, list) or not all(isinstance(index, int) for index in ids):
            raise self._error(f"sent token ids that are no numbers: {str(ids)[:60]}")
        return ids

    def _events(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The data of a server-sent event stream, up to its [DONE]."""
        while line := self._guarded(response.readline):
            name, _, data = line.partition(b":")
            if name == b"data" and data.strip() == b"[DONE]":
                return
            if name == b"data":
                yield data

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """Sends a request and returns the answer to read from. Raises RequestError for any but a good one."""
        address = _address(self.base_url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()

        def answer() -> http.client.HTTPResponse:
            connection.request(method, address.path + path, data, {**self._headers, "Connection": "close"})
            return connection.getresponse()

        response = self._guarded(answer)
        if response.status != http.client.OK:
            with closing(response):
                text = self._guarded(response.read)[:2000].decode("utf-8", "replace")
            raise self._error(f"answers {response.status} {response.reason} to {path}: {_message(text)}")
        return response

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Runs a network call; its failures become a RequestError."""
        try:
            return call()
        except TimeoutError:
            raise self._error(f"said nothing for {self._timeout:g} s: is it still loading? raise the timeout") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise self._error(f"cannot be reached ({reason}): start it or correct the URL") from None

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(data)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._error(f"sent something that is no JSON object: {data[:60]!r}")
        return reply

    def _error(self, what: str) -> RequestError:
        return RequestError(f"the server at {self.base_url} {what}")


class _Progress:
    """What one generation has drawn so far, what may follow, and the request for it."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.params = params
        self.ids, self.new = list(prompt), 0
        self.seed = secrets.randbits(62) if params.seed is None else params.seed
        self.guard = LoopGuard(params.loop_guard) if params.loop_guard else None

    def permits(self, index: int) -> bool:
        """Whether the rules let `index` come next."""
        if index == self._forbidden():
            return False
        if index in self.params.stop_ids:
            return may_stop_at(self.params, self.new)
        ranges = allowed_at(self.params, self.new)
        return not ranges or any(start <= index < end for start, end in ranges)

    def accept(self, token: Token) -> tuple[bool, StopReason | None]:
        """Takes what the server sent: whether it is part of the output, and why to stop after it, if so."""
        if token.id is None:
            return False, token.stop
        if token.id in self.params.stop_ids:
            return False, StopReason.STOP
        self.ids.append(token.id)
        self.new += 1
        if self.guard is not None and self.guard.push(token.id):
            return True, StopReason.LOOP
        return True, StopReason.LENGTH if self.new >= self.params.max_new_tokens else None

    def body(self, single: bool) -> dict[str, Any]:
        """A request for all that is left, or for a `single` id with every rule on it."""
        params = self.params
        body: dict[str, Any] = {
            "prompt": list(self.ids),
            "max_tokens": 1 if single else params.max_new_tokens - self.new,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "seed": (self.seed + self.new) % 2**63,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,  # the stop ids alone end a generation
            "return_token_ids": True,
        }
        ranges = allowed_at(params, self.new) if single else (*params.allowed, *params.cycle)
        stops = params.stop_ids if not single or may_stop_at(params, self.new) else ()
        forbidden = self._forbidden() if single else None
        if ranges:
            allowed = {*stops}.union(*(range(start, end) for start, end in ranges))
            body["allowed_token_ids"] = sorted(allowed - {forbidden})
        elif forbidden is not None:
            body["logit_bias"] = {str(forbidden): _FORBID}
        return body

    def _forbidden(self) -> int | None:
        return forbidden_by_repetition(self.ids, self.params.repetition_window, self.params.repetition_share)


def _address(base_url: str) -> Any:
    try:
        address = urlsplit(base_url)
        usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise RequestError(f"server URL {base_url!r} must look like http://host:8000/v1")
    return address


def _message(reply: str | dict[str, Any]) -> str:
    """The sentence in an error answer, in any of the forms that servers use."""
    if isinstance(reply, str):
        try:
            reply = json.loads(reply)
        except ValueError:
            return str(reply).strip()[:200] or "no reason given"
    while isinstance(reply, dict):
        reply = reply.get("error") or reply.get("message") or reply.get("detail") or "no reason given"
    return str(reply)[:300]
