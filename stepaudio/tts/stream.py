"""Text -> speech while it is drawn: codes from the language model, sound from the decoder, chunk by chunk.

The pieces, prompts, seeds and parameters are those of `StepAudioTTS.synthesize`, so a piece gets the same codes.
What differs: a piece that has begun to sound is never drawn again. Its codes are held back until the first chunk
is complete; a piece that ends before that with a problem is drawn again with the next seed, as offline. Later
problems are told in the `Piece` that comes with the last sound of a piece.
Drawing and decoding overlap in two threads where a device does the work; both end with the iterator.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from cosyvoice.stream import ChunkSchedule, DecoderStream, device_of
from stepaudio.lm.base import Completion, StopReason
from stepaudio.tts.checks import check_sound
from stepaudio.tts.effects import PAUSE_SECONDS, faded
from stepaudio.tts.live import LiveEffects
from stepaudio.tts.speech import Piece, Speech, TTSRequest
from tokenizer.audio import Audio
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.errors import RequestError

if TYPE_CHECKING:
    from stepaudio.tts.engine import Attempt, StepAudioTTS, Take

T = TypeVar("T")
# The defaults by where the decoder runs: on a CPU every frame counts, of the voice prompt too.
GPU_SCHEDULE = ChunkSchedule()
CPU_SCHEDULE = ChunkSchedule(first=10, ahead=5, left=15, prompt_seconds=1.0, num_steps=5, first_steps=4)
_CODES_AHEAD, _CHUNKS_AHEAD = 512, 4  # what the threads may do before it is asked for
_WAIT_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class SpeechChunk:
    """The next sound of a speech; `piece` comes with the last sound of each piece of the text."""

    audio: Audio
    piece: Piece | None = None


class _Drawn(NamedTuple):
    """New codes of a piece; `attempt` tells that it is over."""

    take: Take
    seed: int
    codes: AudioCodes
    attempt: Attempt | None


def stream(
    engine: StepAudioTTS,
    request: TTSRequest,
    schedule: ChunkSchedule | None = None,
    threads: bool | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Generator[SpeechChunk, None, None]:
    """Speaks a request chunk by chunk; work begins when the first chunk is asked for.

    schedule   None takes `GPU_SCHEDULE` or `CPU_SCHEDULE`
    threads    whether drawing and decoding run in threads of their own; None: where a GPU decodes
    cancelled  asked between any two tokens (from a thread, with `threads`); once true the chunks end, unfinished
    Closing the iterator stops everything. Raises RequestError for a request that cannot be served at once, and
    from the iterator when a piece gives no sound in any attempt.
    """
    takes = engine.plan(request)
    effects = LiveEffects(request.speed, request.volume, engine.sample_rate)
    device = device_of(engine.decoder)
    on_gpu = device.type == "cuda"
    schedule = schedule or (GPU_SCHEDULE if on_gpu else CPU_SCHEDULE)
    halt = threading.Event()

    def stopped() -> bool:
        if not halt.is_set() and cancelled is not None and cancelled():
            halt.set()
        return halt.is_set()

    drawn = _draw(engine, takes, schedule, stopped)
    if threads if threads is not None else on_gpu:
        drawn = in_thread(drawn, _CODES_AHEAD)
        chunks = in_thread(_speak(engine, drawn, schedule, len(takes), stopped), _CHUNKS_AHEAD, device)
    else:
        chunks = _speak(engine, drawn, schedule, len(takes), stopped)
    return _finished(chunks, effects, halt)


def gather(chunks: Iterable[SpeechChunk]) -> Speech:
    """All chunks of a stream as one speech."""
    found = list(chunks)
    if not found:
        raise RequestError("the stream was cancelled before it gave any sound")
    audio = Audio(np.concatenate([chunk.audio.samples for chunk in found]), found[0].audio.sample_rate)
    return Speech(audio, tuple(chunk.piece for chunk in found if chunk.piece is not None))


def _draw(
    engine: StepAudioTTS, takes: Sequence[Take], schedule: ChunkSchedule, stopped: Callable[[], bool]
) -> Generator[_Drawn, None, None]:
    """Codes of all pieces, group by group, once a piece has enough of them to sound."""
    for take in takes:
        given = 0
        for number in range(engine.max_attempts):
            seed = (take.params.seed or 0) + number
            ids: list[int] = []
            stop = StopReason.CANCELLED
            for token in engine.lm.stream(take.prompt, replace(take.params, seed=seed), stopped):
                if token.id is None:
                    stop = token.stop or stop
                    break
                ids.append(token.id)
                if len(ids) >= schedule.first + schedule.ahead and len(ids) - given >= LAYOUT.group:
                    yield _Drawn(take, seed, engine.codes(ids[given:]), None)
                    given = len(ids)
            if stop is StopReason.CANCELLED:
                return
            take.attempts.append(engine.judge(take, seed, Completion(tuple(ids), stop)))
            if given or take.settled:
                break
        attempt = take.attempts[-1] if given else take.best
        if len(attempt.codes) == 0:
            raise RequestError(
                f"the model gave no sound for {take.text[:40]!r} in {len(take.attempts)} attempts: "
                "try another seed or other words"
            )
        yield _Drawn(take, attempt.seed, engine.codes(ids[given:]) if given else attempt.codes, attempt)


def _speak(
    engine: StepAudioTTS,
    drawn: Generator[_Drawn, None, None],
    schedule: ChunkSchedule,
    pieces: int,
    stopped: Callable[[], bool],
) -> Generator[SpeechChunk, None, None]:
    """Sound of the codes: pieces joined as `effects.join` does."""
    current: DecoderStream | None = None
    sounds: list[Audio] = []
    done = 0
    with contextlib.closing(drawn):
        for take, seed, codes, attempt in drawn:
            if current is None:
                decoder = engine.music_decoder() if take.music else engine.decoder
                current, sounds = DecoderStream(decoder, take.voice, seed, schedule), []
            audio = current.push(codes)
            if stopped():
                return
            piece = None
            if attempt is not None:
                audio = Audio(np.concatenate([audio.samples, current.close().samples]), audio.sample_rate)
                problems = (*attempt.problems, *check_sound(_whole([*sounds, audio])))
                piece = Piece(take.text, seed, attempt.codes, problems, len(take.attempts))
            if len(audio):
                first, last = done > 0 and not sounds, piece is not None and done < pieces - 1
                yield SpeechChunk(_edged(audio, first, last), piece)
                sounds.append(audio)
            if piece is not None:
                current, done = None, done + 1


def _whole(sounds: Sequence[Audio]) -> Audio:
    return Audio(np.concatenate([sound.samples for sound in sounds]), sounds[0].sample_rate)


def _edged(audio: Audio, first: bool, last: bool) -> Audio:
    """Faded in where another piece came before, faded out and followed by a pause where another comes."""
    samples = faded(audio, begin=first, end=last) if first or last else audio.samples
    if last:
        samples = np.concatenate([samples, np.zeros(int(PAUSE_SECONDS * audio.sample_rate), np.float32)])
    return Audio(samples, audio.sample_rate)


def _finished(
    chunks: Generator[SpeechChunk, None, None], effects: LiveEffects, halt: threading.Event
) -> Generator[SpeechChunk, None, None]:
    """The chunks with speed and volume; whatever ends it ends the work."""
    rate = 0
    with contextlib.closing(chunks):
        try:
            for chunk in chunks:
                rate = chunk.audio.sample_rate
                samples = effects.push(chunk.audio.samples)
                if len(samples) or chunk.piece is not None:
                    yield SpeechChunk(Audio(samples, rate), chunk.piece)
            rest = effects.close()
            if len(rest) and not halt.is_set():
                yield SpeechChunk(Audio(rest, rate))
        finally:
            halt.set()


def in_thread(
    items: Generator[T, None, None], ahead: int, device: torch.device | None = None
) -> Generator[T, None, None]:
    """The same items, made in a thread of its own, at most `ahead` of them before they are asked for.

    On a CUDA `device` the thread works in the stream that all decoding threads share. Closing the iterator, or an
    error of `items`, ends the thread; the error is raised here.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
    halt = threading.Event()

    def give(item: T | None, error: BaseException | None) -> bool:
        while not halt.is_set():
            with contextlib.suppress(queue.Full):
                made.put((item, error), timeout=_WAIT_SECONDS)
                return True
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            with _decoding(device), contextlib.closing(items):
                for item in items:
                    if not give(item, None):
                        return
        except BaseException as raised:  # handed to whoever asks for the next item
            error = raised
        give(None, error or StopIteration())

    thread = threading.Thread(target=work, name="speech", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        halt.set()
        thread.join()


def _decoding(device: torch.device | None) -> contextlib.AbstractContextManager[object]:
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(_decoding_stream(device))


@functools.lru_cache(maxsize=16)
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all speeches of a device, so that what one of them puts there is in order for the others."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
