"""Chat turns and transcriptions by the file: texts, sounds, folders and JSONL in, rows and sound files out.

Knows items and results; models come in as an engine. A run over many items may be killed at any moment, and the same
command goes on where it stopped (see `stepaudio.tts.rows`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from stepaudio.chat.engine import ChatRequest, StepAudio
from stepaudio.chat.messages import HUMAN, SYSTEM, Message, from_dicts, printable
from stepaudio.tts.rows import RESULTS, append, beside, lock, read_rows, resume
from tokenizer.audio import write_audio
from tokenizer.errors import RequestError, describe
from tokenizer.files import make_folder

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
_FIELDS = ("id", "text", "audio", "messages", "system", "speaker", "clone", "seed", "speed", "volume")
_KINDS = {"text": str, "audio": str, "messages": list, "system": str, "speaker": str, "clone": dict}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One thing to answer or to write down."""

    id: str  # also the name of its sound file
    input: str  # the words or the sound file, as they were given
    request: ChatRequest
    task: Literal["chat", "asr"] = "chat"
    sound: str | None = None  # what is written down

    @property
    def digest(self) -> str:
        """Changes whenever the request does, so that a changed item is answered anew."""
        tools = [tool.declaration() for tool in self.request.tools]
        request = replace(self.request, tools=tools, cancelled=None)  # type: ignore[arg-type]
        return hashlib.sha256(repr((self.task, request)).encode("utf-8", "replace")).hexdigest()[:16]


@dataclass(frozen=True)
class ItemResult:
    """One row of results.jsonl; `error` is set instead of the rest when an item failed."""

    id: str
    digest: str
    input: str
    text: str | None = None
    path: str | None = None  # the sound file, in the folder of the results
    seconds: float | None = None  # of sound
    times: Mapping[str, float] = field(default_factory=dict)  # seconds of each stage, and their total
    stop: str | None = None  # why the model ended
    seed: int | None = None
    calls: Sequence[Mapping[str, Any]] = ()  # tools that were called
    problems: Sequence[str] = ()  # what was doubtful
    error: str | None = None

    def for_people(self, folder: Path) -> dict[str, Any]:
        """The row as it is printed: the sound file by its whole path."""
        row = {"audio" if name == "path" else name: value for name, value in asdict(self).items() if name != "digest"}
        return {**row, "audio": self.path and str(folder / self.path)}


def text_item(name: str, text: str, defaults: ChatRequest) -> Item:
    """A human turn of words, behind the messages of `defaults`."""
    return Item(name, printable(text), _with_turns(defaults, [{"role": HUMAN, "content": text}]))


def sound_item(name: str, path: str, defaults: ChatRequest, task: Literal["chat", "asr"] = "chat") -> Item:
    """A human turn of sound, or a sound to write down."""
    turn = {"role": HUMAN, "content": {"type": "audio", "audio": path}}
    return Item(printable(name) or "sound", printable(path), _with_turns(defaults, [turn]), task, path)


def read_items(
    path: str | os.PathLike[str], defaults: ChatRequest, task: Literal["chat", "asr"] = "chat"
) -> list[Item]:
    """The items of a folder of sound files or of a JSONL file.

    Rows are `{"id"}` with one of "text", "audio" (a path) and "messages" (a conversation), and "system", "speaker",
    "clone", "seed", "speed", "volume" if wanted; what a row leaves out is taken from `defaults`. Paths are looked for
    from the current folder, then from the file's. Raises RequestError that names the line, and for an empty folder.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, defaults, task)
    return [_read_item(name, row, where, defaults, task, path.parent) for where, name, row in read_rows(path, _FIELDS)]


def read_history(path: str | os.PathLike[str]) -> list[Message]:
    """A conversation from a JSON file, `[{"role", "content"}, ...]`; sounds as in `read_items`.

    Raises RequestError for what is no such file.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return from_dicts(_located(rows, path.parent))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def run_item(engine: StepAudio, item: Item, folder: Path) -> ItemResult:
    """One item; whatever is wrong with it is raised."""
    return (_transcribe if item.task == "asr" else _answer)(engine, [item], folder)[0]


def run_items(
    engine: StepAudio,
    items: Sequence[Item],
    folder: str | os.PathLike[str],
    batch_size: int = 8,
    report: Callable[[ItemResult], None] = lambda result: None,
    progress: bool = True,
) -> list[ItemResult]:
    """Does what is not done yet and returns the results of all items in order; `report` gets each as it is known.

    Sounds are written down `batch_size` at a time. An error of one item becomes its row. Raises RequestError if the
    folder cannot be written to or another run is at work in it.
    """
    folder = make_folder(folder)
    with lock(folder):
        done = resume(folder, items, _parse_row)
        for item in items:
            if item.id in done:
                report(done[item.id])
        todo = [item for item in items if item.id not in done]
        with (
            open(folder / RESULTS, "a", encoding="utf-8") as log,
            tqdm(total=len(items), initial=len(done), unit="item", disable=not progress) as bar,
        ):
            for batch in _batches(todo, batch_size):
                for result in _attempt(engine, batch, folder):
                    append(log, result)
                    done[result.id] = result
                    report(result)
                    bar.update()
    return [done[item.id] for item in items]


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Turns to answer one by one; sounds to write down in groups that are drawn alike."""
    start = 0
    while start < len(items):
        end = start + 1
        while end < min(start + size, len(items)) and _drawn_alike(items[start], items[end]):
            end += 1
        yield items[start:end]
        start = end


def _drawn_alike(first: Item, other: Item) -> bool:
    one, two = first.request, other.request
    return first.task == other.task == "asr" and (one.seed, one.sampling) == (two.seed, two.sampling)


def _attempt(engine: StepAudio, items: Sequence[Item], folder: Path) -> list[ItemResult]:
    """Results of a batch; if it breaks as a whole, of its items one by one."""
    try:
        return (_transcribe if items[0].task == "asr" else _answer)(engine, items, folder)
    except Exception as error:
        if len(items) == 1:
            reason = describe(error) or repr(error)
            _log.warning("%s: %s", items[0].id, reason, exc_info=describe(error) is None)
            return [ItemResult(items[0].id, items[0].digest, items[0].input, error=printable(reason))]
    return [_attempt(engine, [item], folder)[0] for item in items]


def _answer(engine: StepAudio, items: Sequence[Item], folder: Path) -> list[ItemResult]:
    [item] = items
    begin = time.perf_counter()
    reply = engine.reply(**{entry.name: getattr(item.request, entry.name) for entry in fields(item.request)})
    path = None
    if reply.audio is not None:
        path = write_audio(folder / f"{item.id}.wav", reply.audio).name
    return [
        ItemResult(
            item.id,
            item.digest,
            item.input,
            text=reply.text,
            path=path,
            seconds=None if reply.audio is None else round(reply.audio.seconds, 3),
            times=_rounded({**reply.timings, "total": time.perf_counter() - begin}),
            stop=reply.stop.value,
            seed=item.request.seed,
            calls=[{**asdict(call), "seconds": round(call.seconds, 3)} for call in reply.calls],
            problems=list(reply.problems),
        )
    ]


def _transcribe(engine: StepAudio, items: Sequence[Item], folder: Path) -> list[ItemResult]:
    """Nothing but words: no sound is written to the folder."""
    sounds = [item.sound for item in items if item.sound is not None]
    if len(sounds) < len(items):
        raise RequestError("there is no sound to write down: give one as 'audio'")
    begin = time.perf_counter()
    request = items[0].request
    texts = engine.transcribe(sounds, seed=request.seed, sampling=request.sampling)
    times = _rounded({"total": (time.perf_counter() - begin) / len(items)})
    return [
        ItemResult(item.id, item.digest, item.input, text=text, times=times, seed=request.seed)
        for item, text in zip(items, texts)
    ]


def _rounded(times: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in times.items()}


def _parse_row(line: str) -> ItemResult | None:
    """A row of the log; None for one that was torn by a crash."""
    try:
        return ItemResult(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _read_folder(folder: Path, defaults: ChatRequest, task: Literal["chat", "asr"]) -> list[Item]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SOUND_SUFFIXES and path.is_file())
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise RequestError(f"{folder} holds no sound files ({', '.join(SOUND_SUFFIXES)}); folders in it are not read")
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in paths]
    return [sound_item(name, str(path), defaults, task) for name, path in zip(names, paths)]


def _read_item(
    name: str, row: Mapping[str, Any], where: str, defaults: ChatRequest, task: Literal["chat", "asr"], folder: Path
) -> Item:
    row = {key: value for key, value in row.items() if value is not None}
    for key, kind in _KINDS.items():
        if key in row and not isinstance(row[key], kind):
            raise RequestError(f"{where}: {key!r} must be {'a string' if kind is str else f'a JSON {kind.__name__}'}")
    given = [key for key in ("text", "audio", "messages") if key in row]
    if len(given) != 1:
        raise RequestError(f"{where}: give one of 'text', 'audio' and 'messages', found {', '.join(given) or 'none'}")
    if "clone" in row and "speaker" in row:
        raise RequestError(f"{where}: give either 'speaker' or 'clone', not both")
    options = {key: row[key] for key in ("speaker", "clone", "seed", "speed", "volume") if key in row}
    if "clone" in row:
        clone = row["clone"]
        options |= {"clone": {**clone, "wav_path": beside(clone.get("wav_path"), folder)}, "speaker": None}
    elif "speaker" in row:
        options["clone"] = None
    defaults = replace(defaults, **options)
    if "system" in row:
        defaults = _with_turns(defaults, [{"role": SYSTEM, "content": row["system"]}])
    if "text" in row:
        return replace(text_item(name, row["text"], defaults), task=task)
    if "audio" in row:
        return sound_item(name, beside(row["audio"], folder), defaults, task)
    turns = _located(row["messages"], folder)
    return Item(name, printable(json.dumps(turns, ensure_ascii=False)), _with_turns(defaults, turns), task)


def _with_turns(request: ChatRequest, turns: Sequence[Any]) -> ChatRequest:
    """The request with more turns at its end; a system turn among them takes the place of the one in front."""
    system = [turn for turn in turns if _role(turn) == SYSTEM]
    base = [turn for turn in request.messages if not (system and _role(turn) == SYSTEM)]
    return replace(request, messages=(*system, *base, *(turn for turn in turns if _role(turn) != SYSTEM)))


def _role(turn: Any) -> Any:
    return turn.role if isinstance(turn, Message) else turn.get("role") if isinstance(turn, Mapping) else None


def _located(value: Any, folder: Path) -> Any:
    """A conversation with its sound files looked up."""
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    found = {**value, "content": _located(value["content"], folder)} if "content" in value else dict(value)
    return {**found, "audio": beside(found["audio"], folder)} if "audio" in found else found
