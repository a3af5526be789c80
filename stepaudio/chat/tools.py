"""Functions that the model may call in the middle of an answer.

How a call is written is a convention of this project: the release has the two call pieces in its vocabulary and
says nothing of what stands between them (formats.md section 13.8).
  system turn     the text `tools` of configs/prompts.yaml with one JSON object {"name", "description",
                  "parameters"} per line, and a call as a pattern
  assistant turn  <|CALL_START|>{"name": ..., "arguments": {...}}<|CALL_END|>, several in a row if need be
  tool turn       the result, one turn per call: text as it is, anything else as JSON, a failure as {"error": ...}
The two delimiters are special pieces of the vocabulary, so that no text can forge a call; others can be chosen.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepaudio.chat.messages import SYSTEM, CallPart, Message, TextPart, printable
from stepaudio.chat.prompts import Prompt, prompts
from stepaudio.chat.schema import check_schema, find_fault
from stepaudio.chat.template import Delimiters
from stepaudio.lm.vocab import Vocab
from tokenizer.errors import RequestError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_PATTERN = CallPart('{"name": "...", "arguments": {...}}')
_MAX_ERROR = 300  # characters
_log = logging.getLogger(__name__)


class CallError(Exception):
    """A call that cannot be carried out as it is written; the text is meant for the model."""


@dataclass(frozen=True)
class Tool:
    """A function with the description that the model reads."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments, of type object (see schema.py)
    function: Callable[..., Any]  # called with the arguments as keywords
    timeout: float = 10.0  # seconds; a call that takes longer is given up and left running in its thread
    max_result: int = 4000  # characters of the result that the model gets to see

    def __post_init__(self) -> None:
        """Raises RequestError for a name, schema, time or size that cannot be."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise RequestError(f"tool name {self.name!r} must be up to 64 letters, digits, _ or -, no digit in front")
        if not self.timeout > 0 or self.max_result < 1:
            raise RequestError(f"tool {self.name}: timeout {self.timeout} and max_result {self.max_result} must be > 0")
        check_schema(self.parameters, f"tool {self.name}: parameters")
        if self.parameters.get("type") != "object":
            raise RequestError(f'tool {self.name}: parameters must be a schema of "type": "object"')

    def declaration(self) -> str:
        """What the model reads of it: one line of JSON."""
        row = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True)
class ToolCall:
    """A call that was made: what came back is `result`, unless `error` says what went wrong."""

    name: str
    arguments: Mapping[str, Any]
    result: str
    error: str | None = None
    seconds: float = 0.0

    @property
    def content(self) -> str:
        """What the model gets to see."""
        return self.result if self.error is None else error_content(self.error)


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: the special pieces around them and the text that declares the tools."""

    start: str = "<|CALL_START|>"
    end: str = "<|CALL_END|>"
    instructions: Prompt = field(default_factory=lambda: prompts()["tools"])  # with {tools} and {call}

    def delimiters(self, vocab: Vocab) -> Delimiters:
        """Their ids. Raises RequestError for one that is no special piece of the vocabulary."""
        for piece in (self.start, self.end):
            if piece not in vocab.specials:
                raise RequestError(f"call delimiter {piece!r} is no special piece of the text tokenizer")
        return vocab.specials[self.start], vocab.specials[self.end]


class Toolbox:
    """The tools of one request."""

    def __init__(self, tools: Sequence[Tool], form: ToolFormat) -> None:
        """Raises RequestError for two tools of one name."""
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            raise RequestError(f"tools must have different names, found {', '.join(tool.name for tool in tools)}")
        self._form = form

    def __len__(self) -> int:
        return len(self._tools)

    def declare(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the tools in its system turn, which is added if there is none."""
        if not self._tools:
            return list(messages)
        lines = "\n".join(tool.declaration() for tool in self._tools.values())
        before, _, behind = self._form.instructions.text.partition("{call}")
        parts = [TextPart(before.replace("{tools}", lines)), _PATTERN, TextPart(behind.replace("{tools}", lines))]
        if messages and messages[0].role == SYSTEM:
            head, rest = messages[0], messages[1:]
            return [head.with_parts([*head.parts, TextPart("\n\n"), *parts]), *rest]
        return [Message(SYSTEM, tuple(parts)), *messages]

    def parse(self, body: str) -> tuple[Tool, dict[str, Any]]:
        """The tool and the arguments of a call. Raises CallError that says what is wrong with it."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CallError(f"the call is not valid JSON ({error})") from None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise CallError('a call must be {"name": ..., "arguments": {...}}')
        tool = self._tools.get(call["name"])
        if tool is None:
            raise CallError(f"there is no tool {call['name']!r}, only {', '.join(self._tools)}")
        arguments = call.get("arguments", {})
        fault = find_fault(arguments, tool.parameters, "arguments")
        if fault is not None:
            raise CallError(f"{tool.name}: {fault}")
        return tool, arguments


def run_tool(tool: Tool, arguments: dict[str, Any]) -> ToolCall:
    """Calls a tool within its time. Whatever goes wrong inside it becomes the call's `error`, and is logged."""
    outcome: list[str | Exception] = []
    begin = time.perf_counter()

    def work() -> None:
        try:
            outcome.append(_render(tool.function(**arguments), tool.max_result))
        except Exception as error:
            _log.warning("tool %s failed", tool.name, exc_info=True)
            outcome.append(error)

    thread = threading.Thread(target=work, name=f"tool {tool.name}", daemon=True)
    thread.start()
    thread.join(tool.timeout)
    seconds = time.perf_counter() - begin
    if not outcome:
        _log.warning("tool %s gave no answer within %g s", tool.name, tool.timeout)
        return ToolCall(tool.name, arguments, "", f"no answer within {tool.timeout:g} seconds", seconds)
    done = outcome[0]
    if isinstance(done, str):
        return ToolCall(tool.name, arguments, done, None, seconds)
    return ToolCall(tool.name, arguments, "", f"{type(done).__name__}: {done}"[:_MAX_ERROR], seconds)


def error_content(error: str) -> str:
    """A failure as the model gets to see it."""
    return json.dumps({"error": printable(error)}, ensure_ascii=False)


def _render(result: Any, limit: int) -> str:
    """A result as text, cut to `limit` characters with a note. Raises TypeError or ValueError for no JSON."""
    text = printable(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[cut: the first {limit:,} of {len(text):,} characters]"
