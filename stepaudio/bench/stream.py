"""How soon and how steadily streamed speech comes: first sound, underruns of a player, several streams at once.

A player begins with the first chunk and plays on; a chunk that comes after its turn is an underrun. The baseline in
the same run is the whole speech by `synthesize`, of which nothing is heard before the end.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepaudio.bench.report import Row, row
from stepaudio.bench.tts import Plan, memory_mb, open_engine
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.speech import TTSRequest
from stepaudio.tts.stream import stream

_EARLY_SECONDS = 0.005  # a chunk later than its turn by less than this is on time


@dataclass(frozen=True)
class Heard:
    """What one listener saw: when each chunk came, counted from the request, and how long it is."""

    arrivals: tuple[float, ...]
    lengths: tuple[float, ...]

    @property
    def first(self) -> float:
        return self.arrivals[0]

    @property
    def seconds(self) -> float:
        """Of speech."""
        return sum(self.lengths)

    @property
    def waits(self) -> list[float]:
        """Seconds a player stood still before each chunk but the first."""
        turn, waits = self.first, []
        for arrival, length in zip(self.arrivals, self.lengths):
            waits.append(max(0.0, arrival - turn))
            turn = max(turn, arrival) + length
        return waits[1:]

    @property
    def underruns(self) -> int:
        return sum(wait > _EARLY_SECONDS for wait in self.waits)


def listen(engine: StepAudioTTS, request: TTSRequest) -> Heard:
    """Speaks one request and notes when its sound comes."""
    begin = time.perf_counter()
    arrivals, lengths = [], []
    for chunk in stream(engine, request):
        if len(chunk.audio):
            arrivals.append(time.perf_counter() - begin)
            lengths.append(chunk.audio.seconds)
    return Heard(tuple(arrivals), tuple(lengths))


def measure(plan: Plan) -> Iterator[Row]:
    """The whole speech, one stream, streams at once. Rows come as they are measured."""
    engine = open_engine(plan)
    [request] = plan.requests(1)
    engine.synthesize_batch([request])
    if plan.baseline:
        times = []
        for _ in range(min(3, plan.repeats)):
            begin = time.perf_counter()
            engine.synthesize_batch([request])
            times.append(time.perf_counter() - begin)
        yield row("first sound without streaming", times, plan.seed, device=str(plan.device))
    listen(engine, request)
    yield _row(plan, "first sound, one stream", [listen(engine, one) for one in plan.requests(plan.repeats)])
    at_once(engine, plan.requests(plan.streams))
    rounds = [at_once(engine, plan.requests(plan.streams)) for _ in range(max(1, plan.repeats // 4))]
    yield _row(plan, f"first sound, {plan.streams} streams at once", [heard for one in rounds for heard in one])


def at_once(engine: StepAudioTTS, requests: Sequence[TTSRequest]) -> list[Heard]:
    """One listener per request, all beginning together."""
    found: list[Heard | BaseException | None] = [None] * len(requests)
    gate = threading.Barrier(len(requests))

    def run(index: int) -> None:
        gate.wait()
        try:
            found[index] = listen(engine, requests[index])
        except BaseException as error:  # told to the caller below
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if isinstance(one, Heard)]


def _row(plan: Plan, name: str, heard: list[Heard]) -> Row:
    return {
        **row(name, [one.first for one in heard], plan.seed, device=str(plan.device)),
        "audio_s": round(statistics.mean(one.seconds for one in heard), 3),
        "rtf": round(statistics.median(one.arrivals[-1] / one.seconds for one in heard), 4),
        "underruns": sum(one.underruns for one in heard),
        "longest_wait_s": round(max(max(one.waits, default=0.0) for one in heard), 4),
        "chunks": round(statistics.mean(len(one.arrivals) for one in heard), 1),
        "weights": "random, released shapes" if plan.random else str(plan.folder.name),
        "dtype": str(plan.dtype)[6:],
        "peak_mb": memory_mb(plan.device),
    }
