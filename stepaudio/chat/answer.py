"""One answer of the language model: rounds of generation and tool calls, as a stream.

Knows ids, messages and tools; knows no sound: codes come in with the messages and go out as codes.
A round is one assistant turn. If it calls tools, their results follow as tool turns and the next round begins.
A malformed call gets an error as its result once, so that the model can repair it; the second is the caller's error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace

from stepaudio.chat.history import fit
from stepaudio.chat.messages import ASSISTANT, TOOL, AudioPart, CallPart, Message, Part, TextPart
from stepaudio.chat.output import Output, OutputParser
from stepaudio.chat.template import Delimiters, build_prompt
from stepaudio.chat.tools import CallError, Toolbox, ToolCall, error_content, run_tool
from stepaudio.lm.base import LanguageModel, SamplingParams, StopReason, Token
from stepaudio.lm.vocab import Vocab
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

MAX_ROUNDS = 5  # rounds of tool calls in one answer
_ANSWER_SHARE = 8  # 1/8 of the context is kept for an answer, or max_new_tokens if that is less


class Answer:
    """One answer under way. `run` is the stream; the attributes grow with it.

    Attributes: `messages`, the conversation with what the answer adds to it; `calls`, the tools called; `stop`, why
    the last round ended; `problems`, what was doubtful; `timings`, seconds of "first_token", "generate", "tools".
    """

    def __init__(
        self,
        lm: LanguageModel,
        vocab: Vocab,
        messages: Sequence[Message],
        sampling: SamplingParams,
        toolbox: Toolbox,
        delimiters: Delimiters,
        *,
        trim: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """`sampling` has its seed set; `trim` lets the oldest turns go where the context is too small."""
        self._lm, self._vocab, self._toolbox, self._delimiters = lm, vocab, toolbox, delimiters
        self.messages = list(messages)
        self._sampling = replace(sampling, stop_ids=(vocab.eot,))
        self._trim, self._cancelled = trim, cancelled
        self._repaired = False
        self.calls: list[ToolCall] = []
        self.stop = StopReason.STOP
        self.problems: list[str] = []
        self.timings = {"first_token": 0.0, "generate": 0.0, "tools": 0.0}

    def run(self) -> Iterator[Output | ToolCall]:
        """Text as it is drawn, runs of codes, calls as the model writes them, and each call again when it is done.

        Raises RequestError for a conversation that is too long, a second malformed call, and too many rounds.
        """
        said = False
        for number in range(MAX_ROUNDS + 1):
            calls = yield from self._generate(number, separate=said)
            if not calls or self.stop is StopReason.CANCELLED:
                return
            if not self._toolbox:
                self.problems.append(f"the model calls a tool, but none is given: {calls[0].body[:80]}")
                return
            if number == MAX_ROUNDS:
                raise RequestError(f"the model called tools {MAX_ROUNDS} times in a row and still gave no answer")
            said = said or bool(self.messages[-1].text)
            yield from self._call(calls)

    def _generate(self, number: int, separate: bool) -> Generator[Output, None, list[CallPart]]:
        """One assistant turn; returns its calls. `separate` puts a line end before its text."""
        prompt, params = self._prompt()
        params = replace(params, seed=(params.seed or 0) + number)
        parser = OutputParser(self._vocab, self._delimiters)
        outputs: list[Output] = []
        for token in self._timed(self._lm.stream(prompt, params, self._cancelled)):
            self.stop = token.stop or self.stop
            for output in parser.close() if token.id is None else parser.push(token.id):
                if separate and isinstance(output, str):
                    yield "\n"
                    separate = False
                outputs.append(output)
                yield output
        if parser.strays:
            self.problems.append(f"{parser.strays} audio ids beyond the codes in use are left out")
        self._add_turn(outputs)
        return [output for output in outputs if isinstance(output, CallPart)]

    def _timed(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """The same tokens; the time spent waiting for them is counted, that of whoever consumes them is not."""
        while True:
            begin = time.perf_counter()
            token = next(tokens, None)
            self.timings["generate"] += time.perf_counter() - begin
            if token is None:
                return
            self.timings["first_token"] = self.timings["first_token"] or self.timings["generate"]
            yield token

    def _prompt(self) -> tuple[list[int], SamplingParams]:
        """Ids of the conversation so far, and the sampling with the room that they leave."""
        context = self._lm.max_context
        reserved = min(self._sampling.max_new_tokens, max(1, context // _ANSWER_SHARE))

        def encode(messages: Sequence[Message]) -> list[int]:
            return build_prompt(self._vocab, self._toolbox.declare(messages), self._delimiters)

        prompt, dropped = fit(encode, self.messages, context - reserved, self._trim)
        if dropped:
            self.problems.append(f"the {dropped} oldest messages are left out to stay within the context")
        room = min(self._sampling.max_new_tokens, context - len(prompt))
        return prompt, replace(self._sampling, max_new_tokens=room)

    def _add_turn(self, outputs: Iterable[Output]) -> None:
        """Adds what was said as an assistant turn, or to the one that the caller left open."""
        turn = Message(ASSISTANT, tuple(merge_parts(outputs)))
        if self.messages and self.messages[-1].open and self.messages[-1].role == ASSISTANT:
            turn = turn.with_parts([*self.messages.pop().parts, *turn.parts])
        self.messages.append(turn)

    def _call(self, calls: Sequence[CallPart]) -> Iterator[ToolCall]:
        """Carries out the calls of a round, in order; their results become tool turns."""
        for call in calls:
            try:
                tool, arguments = self._toolbox.parse(call.body)
            except CallError as error:
                self._repair(call, error)
                continue
            done = run_tool(tool, arguments)
            self.timings["tools"] += done.seconds
            self.calls.append(done)
            self._add_result(done.content)
            yield done

    def _repair(self, call: CallPart, error: CallError) -> None:
        if self._repaired:
            raise RequestError(
                f"the model's tool call is malformed, and so was the one before: {error}\nit wrote {call.body[:120]!r}"
            )
        self._repaired = True
        self.problems.append(f"a tool call was malformed: {error}")
        self._add_result(error_content(f"{error}; write the call again"))

    def _add_result(self, content: str) -> None:
        self.messages.append(Message(TOOL, (TextPart(content),)))


def merge_parts(outputs: Iterable[Output]) -> list[Part]:
    """Outputs as parts of a message, pieces of text joined."""
    parts: list[Part] = []
    for output in outputs:
        if isinstance(output, AudioCodes):
            parts.append(AudioPart(output))
        elif isinstance(output, CallPart):
            parts.append(output)
        elif parts and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(parts[-1].text + output)
        else:
            parts.append(TextPart(output))
    return parts
