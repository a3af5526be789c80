"""Answers to questions of the domain in wordings that training never had, asked in writing and by voice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from stepaudio.eval import judges, work
from stepaudio.eval.desk import Desk
from stepaudio.eval.exam import TOOLS
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.work import Answered, Question
from stepaudio.train.domain import Dialogue, number
from stepaudio.train.synth import Line
from stepaudio.train.text import is_chinese, plain

RIGHT = {"text": 0.92, "voice": 0.85}
TOOL_USED, MEMORY, UNKNOWN = 0.90, 0.85, 0.80
_QUESTIONS, _FEW = 200, 60
_SUMS = ("plus", "minus", "calculator")
_IS = {"en": " is ", "zh": "等于"}

KINDS: dict[str, tuple[int, Callable[[Dialogue], bool]]] = {
    "questions": (_QUESTIONS, lambda one: one.intent not in ("memory", "unknown", *TOOLS)),
    "tools": (_FEW, lambda one: one.intent in TOOLS),
    "memory": (_FEW, lambda one: one.intent == "memory"),
    "outside the domain": (_FEW, lambda one: one.intent == "unknown"),
}


def chat(desk: Desk) -> list[Row]:
    """Shares of right answers by kind of question. Sampling is the engine's own; greedy answers stand beside it."""
    rows = []
    for kind, (wanted, keep) in KINDS.items():
        asked = desk.exam.dialogues(wanted, keep)
        written = [Question(humans(one), one.intent in TOOLS, seed=desk.exam.seed) for one in asked]
        rows += _rows(desk, kind, "text", asked, written)
        if kind == "questions":
            greedy = desk.crew.map(work.answer, [replace(one, greedy=True) for one in written], "chat, greedy", 4)
            rows.append(figure("chat questions text, greedy", share(map(is_right, asked, greedy)), len(asked)))
        voices = desk.exam.settings["voices"]
        if reason := judges.missing(*(voice for group in voices.values() for voice in group)):
            rows.append(skipped(f"chat {kind} voice", reason))
            continue
        rows += _rows(desk, kind, "voice", *_spoken(desk, asked, written))
    return rows


def _spoken(
    desk: Desk, asked: Sequence[Dialogue], written: Sequence[Question]
) -> tuple[list[Dialogue], list[Question]]:
    """The questions by the voices of training, one after the other; a dialogue keeps to one voice, and one that a
    synthesiser refuses is left out.
    """
    lines: list[Line] = []
    for i, one in enumerate(asked):
        voices = desk.exam.settings["voices"][one.language]
        lines += [Line(turn, voices[i % len(voices)]) for turn in humans(one)]
    takes = iter(desk.teacher(lines))
    spoken = [(one, question, [next(takes) for _ in question.turns]) for one, question in zip(asked, written)]
    kept = [(one, question, sounds) for one, question, sounds in spoken if all(sounds)]
    questions = [replace(question, turns=tuple(take.audio for take in sounds if take)) for _, question, sounds in kept]
    return [one for one, _, _ in kept], questions


def _rows(desk: Desk, kind: str, how: str, asked: Sequence[Dialogue], questions: Sequence[Question]) -> list[Row]:
    answers = desk.crew.map(work.answer, questions, f"chat {kind} {how}", 4)
    n, name = len(asked), f"chat {kind} {how}"
    if kind == "tools":
        used = [tool_used(one, answer) for one, answer in zip(asked, answers)]
        return [
            figure(f"{name}: called and used", share(used), n, at_least=TOOL_USED),
            figure(f"{name}: with the right arguments", share(map(right_arguments, asked, answers)), n),
        ]
    right = list(map(is_right, asked, answers))
    bound = {"questions": RIGHT[how], "memory": MEMORY, "outside the domain": UNKNOWN}[kind]
    by_language = {
        language: round(share(ok for ok, one in zip(right, asked) if one.language == language), 3)
        for language in sorted({one.language for one in asked})
    }
    rows = [figure(f"{name} right", share(right), n, at_least=bound, **by_language)]
    if kind == "questions":
        intents = sorted({one.intent for one, ok in zip(asked, right) if not ok})
        wrong = {i: sum(one.intent == i and not ok for one, ok in zip(asked, right)) for i in intents}
        rows[0]["wrong"] = {i: [count, sum(one.intent == i for one in asked)] for i, count in wrong.items()}
    return rows


def humans(one: Dialogue) -> tuple[str, ...]:
    """What is asked, turn by turn."""
    return tuple(turn.text for turn in one.turns if turn.role == "human")


def share(flags: object) -> float:
    """Share that is true; 0 of nothing."""
    found = list(flags)  # type: ignore[call-overload]
    return sum(map(bool, found)) / max(1, len(found))


def is_right(one: Dialogue, answer: Answered) -> bool:
    """Whether the answer says the key: as whole words, as often as the expected answer does.

    A sum repeats its operands, so its result must be all that stands behind the last "is".
    """
    wanted, said = plain(one.turns[-1].text), plain(answer.text)
    if said == wanted:
        return True
    key = plain(one.key)
    if one.intent in _SUMS:
        return said.rpartition(_IS[one.language])[2].strip() == key and _IS[one.language] in said
    return 0 < times(key, wanted) <= times(key, said)


def times(key: str, text: str) -> int:
    """How often words (Mandarin: characters) occur in a row."""
    return text.count(key) if is_chinese(key) else f" {text} ".replace(" ", "  ").count(f" {key.replace(' ', '  ')} ")


def tool_used(one: Dialogue, answer: Answered) -> bool:
    """Whether the right tool got a call it accepts, and the answer says what came back, or for a timer, its minutes."""
    calls = [call for call in answer.calls if call[0] == one.intent]
    if not calls:
        return False
    _, arguments, result = calls[-1]
    return any(times(plain(word), plain(answer.text)) for word in _results(one, arguments, result))


def _results(one: Dialogue, arguments: dict, result: str) -> list[str]:
    """Ways to say a result: a word as it is, a number in words."""
    spoken = {"timer": arguments.get("minutes"), "calculator": result}.get(one.intent, "")
    try:
        return [number(int(spoken), one.language)]
    except (ValueError, TypeError, AssertionError):
        return [result]


def right_arguments(one: Dialogue, answer: Answered) -> bool:
    """Whether a call is the expected one."""
    wanted = next(json.loads(turn.text) for turn in one.turns if turn.call)
    return any({"name": name, "arguments": arguments} == wanted for name, arguments, _ in answer.calls)
