"""What a language model's ids say: text, runs of audio codes, tool calls, in the order they come.

Knows the vocabulary; knows no messages and no sound. Other special pieces are left out (formats.md section 10,
Q41). A checkpoint that speaks directly emits audio ids; the released one is not known to (section 13.9).
"""

from __future__ import annotations

from stepaudio.chat.messages import CallPart, printable
from stepaudio.chat.template import Delimiters
from stepaudio.lm.vocab import TextStream, Vocab
from tokenizer.codes import LAYOUT, AudioCodes

Output = str | AudioCodes | CallPart


class OutputParser:
    """Reads ids one at a time. Text comes out at once, a run of codes and a call when they are over."""

    def __init__(self, vocab: Vocab, delimiters: Delimiters) -> None:
        self._vocab = vocab
        self._start, self._end = delimiters
        self._text = TextStream(vocab)
        self._call: tuple[TextStream, list[str]] | None = None
        self._codes: list[int] = []
        self.strays = 0  # audio ids beyond the codes in use

    def push(self, index: int) -> list[Output]:
        """What becomes certain with this id; may be nothing."""
        first, end = self._vocab.audio_range
        if self._call is None and first <= index < end:
            self._take_code(index - first)
            return []
        done = self._end_of_run()
        if index == self._start and self._call is None:
            self._call = TextStream(self._vocab), []
        elif self._call is None:
            done.append(printable(self._text.push(index)))
        elif index == self._end:
            done += self._end_of_call()
        else:
            stream, pieces = self._call
            pieces.append(stream.push(index))
        return [item for item in done if item != ""]

    def close(self) -> list[Output]:
        """What is left at the end; a call without an end counts as one."""
        return [item for item in (*self._end_of_run(), *self._end_of_call(), self._text.close()) if item != ""]

    def _take_code(self, code: int) -> None:
        if code < LAYOUT.size:
            self._codes.append(code)
        else:
            self.strays += 1

    def _end_of_run(self) -> list[Output]:
        codes, self._codes = self._codes, []
        return [AudioCodes(codes)] if codes else []

    def _end_of_call(self) -> list[Output]:
        if self._call is None:
            return []
        stream, pieces = self._call
        self._call = None
        return [CallPart(printable("".join([*pieces, stream.close()])).strip())]
