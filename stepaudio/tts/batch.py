"""Many texts from a JSONL file: `out/{id}.wav` each, and `out/results.jsonl` with one row each.

A run may be killed at any moment; the same command goes on where it stopped (see `rows`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stepaudio.tts.rows import RESULTS, append, beside, lock, read_rows, resume
from stepaudio.tts.speech import Speech, TTSRequest
from stepaudio.tts.text import speech_seconds
from tokenizer.audio import write_audio
from tokenizer.errors import RequestError, StepAudioError, describe
from tokenizer.files import make_folder

_FIELDS = ("id", "text", "speaker", "clone", "seed", "speed", "volume")
_BAR = "{percentage:3.0f}% |{bar}| {n}/{total} s of speech [{elapsed}<{remaining}, {postfix}]"
_log = logging.getLogger(__name__)


class Synthesizer(Protocol):
    """What a batch needs of the engine."""

    def synthesize_batch(self, requests: Sequence[TTSRequest]) -> list[Speech | StepAudioError]: ...


@dataclass(frozen=True)
class Job:
    """One row of the input."""

    id: str
    request: TTSRequest

    @property
    def digest(self) -> str:
        """Changes whenever the request does, so that a changed row is spoken anew."""
        return hashlib.sha256(repr(self.request).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """One row of results.jsonl; `error` is set instead of the sound's figures when an item failed."""

    id: str
    digest: str
    path: str | None = None
    seconds: float | None = None  # of sound
    seed: int | None = None
    rtf: float | None = None  # time its batch took, over the batch's sound
    problems: tuple[str, ...] = ()
    error: str | None = None


def read_jobs(path: str | os.PathLike[str], defaults: TTSRequest) -> list[Job]:
    """Rows `{"id", "text"}` with "speaker" or "clone", and "seed", "speed", "volume" if wanted.

    What a row leaves out is taken from `defaults`. A clone's `wav_path` is looked for from the current
    folder, then from the file's. Raises RequestError that names the line: broken JSON, a wrong or unknown
    field, an id that is no file name or comes twice.
    """
    folder = Path(path).parent
    return [_read_job(name, row, where, defaults, folder) for where, name, row in read_rows(path, _FIELDS)]


def run_jobs(
    jobs: Sequence[Job], engine: Synthesizer, folder: str | os.PathLike[str], batch_size: int = 8, progress: bool = True
) -> list[Result]:
    """Speaks what is not done yet, items of similar length together, and returns the results of all jobs in order.

    An error of one item becomes its row. Raises RequestError if the folder cannot be written to or another
    run is at work in it.
    """
    folder = make_folder(folder)
    with lock(folder):
        done = resume(folder, jobs, _parse_row)
        todo = sorted((job for job in jobs if job.id not in done), key=lambda job: speech_seconds(job.request.text))
        with open(folder / RESULTS, "a", encoding="utf-8") as log, _progress(todo, progress) as bar:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                for job, result in zip(batch, _run_batch(batch, engine, folder)):
                    append(log, result)
                    done[result.id] = result
                    bar.set_postfix_str(f"{len(done)}/{len(jobs)} items", refresh=False)
                    bar.update(_expected(job))
    return [done[job.id] for job in jobs]


def _expected(job: Job) -> int:
    """Seconds of speech that a job will probably give, the measure of its work."""
    return max(1, round(speech_seconds(job.request.text)))


def _progress(todo: Sequence[Job], shown: bool) -> tqdm:
    return tqdm(total=sum(map(_expected, todo)), disable=not shown, bar_format=_BAR)


def _run_batch(jobs: Sequence[Job], engine: Synthesizer, folder: Path) -> Iterator[Result]:
    """Writes the sound of each job and yields its row."""
    begin = time.perf_counter()
    speeches = _synthesize(jobs, engine)
    sound = sum(speech.seconds for speech in speeches if isinstance(speech, Speech))
    rtf = round((time.perf_counter() - begin) / max(sound, 1e-9), 4)
    for job, speech in zip(jobs, speeches):
        if not isinstance(speech, Speech):
            _log.warning("%s: %s", job.id, speech)
            yield Result(job.id, job.digest, error=str(speech))
            continue
        path = write_audio(folder / f"{job.id}.wav", speech.audio)
        yield Result(
            job.id,
            job.digest,
            path=path.name,
            seconds=round(speech.seconds, 3),
            seed=job.request.seed,
            rtf=rtf,
            problems=tuple(speech.problems),
        )


def _synthesize(jobs: Sequence[Job], engine: Synthesizer) -> list[Speech | BaseException]:
    """A batch; if it breaks as a whole (out of memory, say), its items one by one."""
    try:
        return list(engine.synthesize_batch([job.request for job in jobs]))
    except Exception as error:
        reason = describe(error) or repr(error)
        if len(jobs) == 1:
            _log.warning("%s failed: %s", jobs[0].id, reason, exc_info=describe(error) is None)
            return [RequestError(reason)]
        _log.warning("a batch of %d failed, trying its items alone: %s", len(jobs), reason)
    return [_synthesize([job], engine)[0] for job in jobs]


def _parse_row(line: str) -> Result | None:
    """A row of the log; None for one that was torn by a crash."""
    try:
        row = json.loads(line)
        return Result(**{**row, "problems": tuple(row["problems"])})
    except (ValueError, TypeError, KeyError):
        return None


def _read_job(name: str, row: dict[str, Any], where: str, defaults: TTSRequest, folder: Path) -> Job:
    if not isinstance(row.get("text"), str):
        raise RequestError(f"{where}: 'text' is missing or not a string")
    for field, kind, wanted in (("speaker", str, "a string"), ("clone", dict, "an object")):
        if row.get(field) is not None and not isinstance(row[field], kind):
            raise RequestError(f"{where}: {field!r} must be {wanted}")
    if row.get("clone") is not None and row.get("speaker") is not None:
        raise RequestError(f"{where}: give either 'speaker' or 'clone', not both")
    given = {field: row[field] for field in _FIELDS[1:] if row.get(field) is not None}
    if "clone" in given:
        clone = given["clone"]
        given |= {"clone": {**clone, "wav_path": beside(clone.get("wav_path"), folder)}, "speaker": None}
    elif "speaker" in given:
        given["clone"] = None
    return Job(name, replace(defaults, **given))
