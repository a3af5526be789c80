"""How fast a checkpoint is on two CPU cores, with the synthesiser and the recogniser of the system beside it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from stepaudio.eval import judges
from stepaudio.eval.crew import Crew, engine
from stepaudio.eval.desk import Desk, both, sounds_at
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.speech import VOICE
from stepaudio.train.synth import Line
from stepaudio.train.synth import speak as synthesise
from tokenizer.audio import TOKENIZER_RATE, Audio

CORES = 2
TTS_RTF, ASR_RTF, REPLY_SECONDS = 0.5, 0.2, 4.0
_QUESTION_SECONDS = 3.0
_ITEMS = 10


def speed(desk: Desk) -> list[Row]:
    """Median over single items, one at a time after a first one, in a process of its own with two cores."""
    texts = desk.exam.sentences(_ITEMS, "en")
    voice = desk.exam.settings["named"][VOICE]
    if reason := judges.missing(voice):
        return [skipped("speed", reason)]
    takes = desk.teacher([Line(text, voice) for text in texts])
    places = both(takes)
    sounds, texts = sounds_at(takes, places), [texts[i] for i in places]
    crew = Crew(replace(desk.crew.setup, device="cpu", dtype="float32", threads=CORES), 1)
    try:
        [times] = crew.map(timed, [(texts, sounds, voice)], "speed")
    finally:
        crew.close()
    n, cores = len(texts), len(usable_cores())
    rows = [
        figure("speed TTS RTF", times["tts"], n, at_most=TTS_RTF, cores=cores),
        figure("speed TTS RTF of the teacher", times["teacher"], n, cores=cores),
        figure("speed ASR RTF", times["asr"], n, at_most=ASR_RTF, cores=cores),
        figure("speed spoken reply to a 3 s question, s", times["reply"], n, at_most=REPLY_SECONDS, cores=cores),
    ]
    if "sphinx" in times:
        rows.insert(3, figure("speed ASR RTF of pocketsphinx", times["sphinx"], n, cores=cores))
    return rows


def timed(items: Sequence[tuple[list[str], list[Audio], str]]) -> list[dict[str, float]]:
    """Runs in the process of its own: medians of time over sound, and of the seconds of a reply."""
    return [_timed(*item) for item in items]


def _timed(texts: list[str], sounds: list[Audio], voice: str) -> dict[str, float]:
    with two_cores():
        found = {
            "tts": _rtf(lambda text: engine().tts.synthesize(text, VOICE).seconds, texts),
            "teacher": _rtf(lambda text: len(synthesise(Line(text, voice))) / TOKENIZER_RATE, texts),
            "asr": _rtf(lambda sound: (engine().transcribe(sound), sound.seconds)[1], sounds),
            "reply": statistics.median(_replies(sounds)),
        }
        if not judges.missing("pocketsphinx"):
            found["sphinx"] = _rtf(lambda sound: (judges.sphinx([sound]), sound.seconds)[1], sounds)
    return found


def _rtf(call: Callable[[object], float], items: Sequence[object]) -> float:
    """Median time over the seconds of sound that a call says; the first item is done once more in front."""
    ratios = []
    for item in [items[0], *items]:
        begin = time.perf_counter()
        sound = call(item)
        ratios.append((time.perf_counter() - begin) / max(sound, 1e-9))
    return statistics.median(ratios[1:])


def _replies(sounds: list[Audio]) -> Iterator[float]:
    """Seconds from a question of 3 s to its whole spoken answer; silence fills the question up."""
    length = round(_QUESTION_SECONDS * TOKENIZER_RATE)
    for place, sound in enumerate([sounds[0], *sounds]):
        samples = np.pad(sound.samples[:length], (0, max(0, length - len(sound))))
        question = [{"role": "human", "content": {"type": "audio", "audio": Audio(samples, sound.sample_rate)}}]
        begin = time.perf_counter()
        engine().reply(question, speaker=VOICE)
        if place:
            yield time.perf_counter() - begin


def usable_cores() -> list[int]:
    """Cores this process may use, the first two of them."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(min(CORES, os.cpu_count() or 1)))
    return sorted(os.sched_getaffinity(0))[:CORES]


@contextmanager
def two_cores() -> Iterator[None]:
    """Only two cores for this process and the programs it starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable_cores())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
