"""Speech while it is drawn: the same codes as offline, threads that end, errors that are told."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from cosyvoice.stream import ChunkSchedule
from stepaudio.checkpoints import BUNDLED
from stepaudio.lm.base import Completion, StopReason, Token
from stepaudio.tts import stream as streaming
from stepaudio.tts.effects import PAUSE_SECONDS, change_speed, change_volume
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.live import LiveEffects
from stepaudio.tts.speech import TTSRequest
from stepaudio.tts.stream import gather, in_thread
from tests.tts.fakes import FakeLM, make_engine
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

RATE = 22_050
QUICK = ChunkSchedule(first=10, ahead=5, left=0, largest=20, num_steps=1, first_steps=1)
TEXT = "你好，世界。"
LONG = "今天天气很好，我们去公园走走。" * 4


class TokenLM(FakeLM):
    """The fake's answers, token by token; notes how many were drawn and that every stream was closed."""

    drawn = closed = 0
    prompts: tuple[list[int], ...] = ()

    def stream(self, prompt, params, cancelled=None):
        self.prompts = (*self.prompts, list(prompt))
        try:
            answer = self._answer(params)
            for index in answer.ids:
                self.drawn += 1
                yield Token(index)
                if cancelled is not None and cancelled():
                    yield Token(None, StopReason.CANCELLED)
                    return
            yield Token(None, answer.stop)
        finally:
            self.closed += 1


class ToneStream:
    """In place of a `DecoderStream`: two tones' worth of samples per code, ten codes behind."""

    def __init__(self, decoder, prompt, seed, schedule):
        self._start()

    def _start(self):
        self.came, self.heard = 0, 0

    def push(self, codes: AudioCodes) -> Audio:
        self.came += len(codes)
        return self._until(max(0, self.came - 10))

    def close(self) -> Audio:
        return self._until(self.came)

    def _until(self, code: int) -> Audio:
        at = np.arange(self.heard * 529, code * 529)
        self.heard = max(self.heard, code)
        return Audio(0.4 * np.sin(at / 20).astype(np.float32), RATE)


@pytest.fixture
def tones(golden, tmp_path, monkeypatch):
    """An engine over fakes whose decoder streams tones."""
    monkeypatch.setattr(streaming, "DecoderStream", ToneStream)
    monkeypatch.setattr(streaming, "device_of", lambda decoder: __import__("torch").device("cpu"))

    def make(spoil=None, groups=25, **options) -> StepAudioTTS:
        engine = make_engine(golden, tmp_path, **options)
        engine.lm = TokenLM(engine.vocab.audio_base, groups, spoil=spoil)
        return engine

    return make


def speech_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "speech"]


@pytest.fixture(scope="module")
def spoken(tiny):
    return StepAudioTTS.from_dir(tiny, max_attempts=1)


@pytest.mark.parametrize("threads", [False, True])
def test_the_codes_and_the_length_are_those_of_synthesize(spoken, threads):
    request = TTSRequest(TEXT, speaker="Tingting", seed=4)
    offline = spoken.synthesize(TEXT, "Tingting", seed=4)
    online = gather(spoken.stream(request, schedule=QUICK, threads=threads))
    assert [piece.codes for piece in online.pieces] == [piece.codes for piece in offline.pieces]
    assert abs(len(online.audio) - len(offline.audio)) <= 256 and not speech_threads()


def test_tags_reach_the_prompt_and_the_flow(tones, monkeypatch):
    engine, used = tones(), []
    monkeypatch.setattr(ToneStream, "__init__", lambda self, decoder, *_: used.append(decoder) or self._start())
    plain, fast, rap = (gather(engine.stream(text, schedule=QUICK)) for text in (TEXT, "（快速）" + TEXT, "（RAP）哟"))
    assert used == [engine.decoder, engine.decoder, engine.music_decoder()] and len(rap.audio)
    assert engine.lm.prompts[1] != engine.lm.prompts[0] and plain.codes == fast.codes


def test_two_streams_in_turns(spoken):
    requests = [TTSRequest(TEXT, speaker="Tingting", seed=seed) for seed in (1, 2)]
    alone = [gather(spoken.stream(request, schedule=QUICK)).audio.samples for request in requests]
    streams = [spoken.stream(request, schedule=QUICK) for request in requests]
    parts: list[list[np.ndarray]] = [[], []]
    while any(pair := [next(one, None) for one in streams]):
        for row, chunk in enumerate(pair):
            parts[row] += [chunk.audio.samples] if chunk else []
    assert all(np.array_equal(np.concatenate(parts[row]), alone[row]) for row in range(2))


def test_pieces_are_joined_as_offline(tones):
    engine = tones(max_piece_seconds=5.0)
    chunks = list(engine.stream(LONG, schedule=QUICK))
    pieces = [chunk.piece for chunk in chunks if chunk.piece]
    assert len(pieces) > 1 and [piece.seed for piece in pieces] == [1000 * i for i in range(len(pieces))]
    samples = np.concatenate([chunk.audio.samples for chunk in chunks])
    pause = int(PAUSE_SECONDS * RATE)
    assert len(samples) == sum(529 * len(piece.codes) for piece in pieces) + pause * (len(pieces) - 1)
    end = 529 * len(pieces[0].codes)
    assert not samples[end : end + pause].any() and abs(samples[end - 1]) < 1e-3 and abs(samples[end + pause]) < 1e-3


def test_a_piece_is_drawn_again_only_while_nothing_was_heard(tones):
    def spoil(seed):
        return Completion((), StopReason.STOP) if seed == 0 else None

    engine = tones(spoil)
    [piece] = gather(engine.stream(TEXT, schedule=QUICK)).pieces
    assert (piece.seed, piece.attempts, piece.problems) == (1, 2, ())

    def late(seed):
        ids = AudioCodes.merge([1, 2] * 20, [3, 4, 5] * 20).to_ids(engine.vocab.audio_base)
        return Completion(tuple(ids), StopReason.LOOP)

    engine.lm.spoil = late
    [piece] = gather(engine.stream(TEXT, schedule=QUICK)).pieces
    assert (piece.seed, piece.attempts) == (0, 1) and "loop" in [problem.kind for problem in piece.problems]


@pytest.mark.parametrize("threads", [False, True])
def test_no_sound_at_all_is_an_error(tones, threads):
    engine = tones(lambda seed: Completion((), StopReason.STOP))
    with pytest.raises(RequestError, match="no sound for '你好"):
        list(engine.stream(TEXT, schedule=QUICK, threads=threads))
    assert not speech_threads()


def test_bad_requests_are_refused_at_once(tones):
    engine = tones()
    for wrong, message in (
        (TTSRequest(""), "empty"),
        (TTSRequest(TEXT, speaker="Nobody"), "Nobody"),
        (TTSRequest(TEXT, speed=9.0), "speed"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.stream(wrong)
    with pytest.raises(RequestError, match="cancelled"):
        gather([])


@pytest.mark.parametrize("threads", [False, True])
def test_cancel_and_close_stop_everything(tones, threads):
    engine = tones(groups=4000)
    flag = threading.Event()
    chunks = engine.stream(TEXT, schedule=QUICK, threads=threads, cancelled=flag.is_set)
    next(chunks)
    flag.set()
    before = engine.lm.drawn
    assert len(list(chunks)) <= 5 and (threads or engine.lm.drawn - before <= 5)
    chunks = engine.stream(TEXT, schedule=QUICK, threads=threads)
    next(chunks)
    chunks.close()
    assert engine.lm.closed == 2 and not speech_threads()
    assert list(engine.stream(TEXT, schedule=QUICK, threads=threads, cancelled=lambda: True)) == []


def test_a_thread_stays_within_its_bounds_and_ends():
    made = []

    def count():
        for number in range(1000):
            made.append(number)
            yield number

    items = in_thread(count(), 3)
    assert next(items) == 0
    time.sleep(0.15)
    assert len(made) <= 5
    items.close()
    assert not speech_threads()
    assert list(in_thread((number for number in range(50)), 2)) == list(range(50))

    def fail():
        yield 1
        raise ValueError("broken")

    items = in_thread(fail(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


@pytest.mark.parametrize("speed, volume", [(1.0, 1.0), (0.5, 1.0), (1.3, 3.0), (2.0, 0.5), (1.0, 9.0)])
@pytest.mark.parametrize("count", [0, 3, 500, 40_000])
def test_live_effects_are_the_effects(speed, volume, count):
    rng = np.random.default_rng(count)
    at = np.arange(count) / RATE
    samples = (0.5 * np.sin(2 * np.pi * 150 * at) * np.sin(3 * at) + 0.02 * rng.standard_normal(count)).astype("f4")
    whole = change_volume(change_speed(Audio(samples, RATE), speed), volume).samples
    live, parts = LiveEffects(speed, volume, RATE), []
    for part in np.split(samples, np.sort(rng.integers(0, count + 1, 12))):
        parts.append(live.push(part))
    joined = np.concatenate([*parts, live.close()])
    assert len(joined) == len(whole)
    assert count == 0 or np.abs(joined - whole).max() < 1e-5


def test_effects_on_a_stream(tones):
    engine = tones()
    plain = gather(engine.stream(TEXT, schedule=QUICK)).audio
    request = replace(TTSRequest(TEXT), speed=1.5, volume=2.0)
    changed = gather(engine.stream(request, schedule=QUICK)).audio
    expected = change_volume(change_speed(plain, 1.5), 2.0)
    assert len(changed) == len(expected) and np.abs(changed.samples - expected.samples).max() < 1e-5


@pytest.mark.gpu
def test_a_stream_on_the_gpu():
    engine = StepAudioTTS.from_dir(BUNDLED, device="cuda")
    text = "the capital of france is paris"
    online = [gather(engine.stream(text, threads=threads)) for threads in (True, False)]
    assert online[0].codes == online[1].codes == engine.synthesize(text).codes
    assert np.abs(online[0].audio.samples - online[1].audio.samples).max() < 1e-2 and not speech_threads()
