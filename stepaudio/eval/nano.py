"""The evaluation of a nano checkpoint: its parts by name, run one after the other into a result file.

Every figure is a row with its bound and, from the same run, its baseline; see `rows`. A part that is done for this
checkpoint, seed and limit is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stepaudio.eval.chat import chat
from stepaudio.eval.clone import clone
from stepaudio.eval.desk import Desk
from stepaudio.eval.listen import asr, codec
from stepaudio.eval.rows import Results, Row
from stepaudio.eval.speech import speech
from stepaudio.eval.speed import speed
from stepaudio.eval.tags import tags

PARTS: dict[str, Callable[[Desk], list[Row]]] = {
    "asr": asr,
    "codec": codec,
    "speech": speech,
    "tags": tags,
    "clone": clone,
    "chat": chat,
    "speed": speed,
}


def evaluate(desk: Desk, results: Results, parts: Sequence[str], again: bool = False) -> None:
    """Runs the parts that are not done; the file is written after each."""
    for part in parts:
        if results.done(part) and not again:
            print(f"{part}: done before", flush=True)
            continue
        begin = time.perf_counter()
        rows = PARTS[part](desk)
        spent = time.perf_counter() - begin
        results.replace(part, rows, spent)
        print(f"{part}: {len(rows)} figures in {spent:.0f} s", flush=True)
