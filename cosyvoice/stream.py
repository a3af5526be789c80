"""Codes -> sound while the codes still come: a flow window and a vocoder chunk at a time.

`DecoderStream.push(codes)` gives the sound that is ready, `close()` the rest. A `ChunkSchedule` alone decides
where chunks end; how the codes are cut into pushes changes nothing. For each chunk the flow runs over the voice
prompt, some codes already heard, the chunk's codes and a few behind them. Noise belongs to absolute frames
(`wave_stream`), so what two windows share comes out nearly alike, and the seam is faded over in the mel, where
the older window looked ahead, and once more in the sound. With one window over everything the result is that of
`SpeechDecoder.decode` for the same noise (`stream_noise`). Source: formats.md 7.3, 7.5.
Legend: n codes, T1 prompt frames, T frames, M mel bands. Frames and codes are counted from the stream's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cosyvoice.config import CosyVoiceConfig, FlowConfig
from cosyvoice.decoder import DecoderNoise, SpeechDecoder
from cosyvoice.flow import FlowRequest, num_frames
from cosyvoice.prompt import VoicePrompt
from cosyvoice.wave_stream import WaveChunk, WaveState, cross_fade, flow_noise, source_draws, vocode
from tokenizer.audio import Audio
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.errors import RequestError


@dataclass(frozen=True)
class ChunkSchedule:
    """Where a stream is cut, and how much around each chunk is looked at. Counts are codes (24 ms each)."""

    first: int = 10  # of the first chunk: with `ahead`, what has to be drawn before anything is heard
    growth: float = 2.0  # each chunk is so many times the one before it
    largest: int = 120  # of any chunk
    ahead: int = 10  # behind a chunk, seen by the flow and the vocoder and heard in the next chunk
    left: int = 30  # already heard, seen again by the flow
    prompt_seconds: float | None = None  # the flow sees so much of the voice prompt's end; None: all of it
    num_steps: int = 10  # of the flow
    first_steps: int = 10  # of the flow for the first chunk
    mel_fade: int = 8  # frames over which two windows blend
    wave_fade: int = 256  # samples over which two chunks blend

    def __post_init__(self) -> None:
        """Raises RequestError that names the value and its range."""
        lowest = {"first": 5, "largest": 5, "ahead": 5, "left": 0}  # whole groups
        lowest |= {"num_steps": 1, "first_steps": 1, "mel_fade": 0, "wave_fade": 0}
        for name, low in lowest.items():
            value, step = getattr(self, name), LAYOUT.group if name in ("first", "largest", "ahead", "left") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low or value % step:
                what = f"a multiple of {step}" if step > 1 else "a whole number"
                raise RequestError(f"chunk schedule: {name} {value!r} must be {what} from {low} up")
        if not 1 <= self.growth <= 10:
            raise RequestError(f"chunk schedule: growth {self.growth!r} must lie in 1..10")
        if self.prompt_seconds is not None and not 0 <= self.prompt_seconds <= 3600:
            raise RequestError(
                f"chunk schedule: prompt_seconds {self.prompt_seconds!r} must lie in 0..3600, or be None"
            )

    def size(self, chunk: int) -> int:
        """Codes of a chunk, counted from 0; whole groups."""
        wanted = min(self.first * self.growth ** min(chunk, 64), self.largest)
        return round(wanted / LAYOUT.group) * LAYOUT.group


WHOLE = ChunkSchedule(first=10**9, largest=10**9)  # one chunk, at close: the oracle of every other schedule


def stream_noise(config: CosyVoiceConfig, prompt: VoicePrompt | None, codes: int, seed: int) -> DecoderNoise:
    """What a stream of so many codes draws, for `SpeechDecoder.decode`: a whole decode of the same noise."""
    frames = num_frames(codes, config.flow)
    prompt_frames = 0 if prompt is None else len(prompt.mel)
    return DecoderNoise(
        flow_noise(seed, prompt_frames, 0, frames, config.flow.output_size),
        source_draws(seed, 0, frames, config.hift),
    )


@dataclass(frozen=True, eq=False)
class StreamState:
    """Where a stream is; never changed in place, so that keeping one is a snapshot."""

    codes: np.ndarray  # int64 [n] all that came
    chunk: int  # chunks heard
    heard: int  # codes heard
    mel_tail: Tensor  # [M, f] the last window's look ahead, to fade out
    wave: WaveState
    closed: bool = False


@dataclass(frozen=True, eq=False)
class Window:
    """One run of the flow, and which part of it is new."""

    request: FlowRequest
    num_steps: int
    skip: int  # frames of the result that were heard before
    heard: int  # frames behind them that are heard now
    codes: int  # codes that are heard after it
    last: bool


class DecoderStream:
    """One voice speaking codes as they come. `state` may be kept and set back at any time."""

    def __init__(
        self,
        decoder: SpeechDecoder,
        prompt: VoicePrompt | None,
        seed: int = 0,
        schedule: ChunkSchedule | None = None,
    ) -> None:
        """`schedule` None takes the defaults of `ChunkSchedule`."""
        self.decoder, self.seed = decoder, seed
        self.schedule = schedule or ChunkSchedule()
        config = decoder.config.flow
        self._prompt = _shortened(prompt or _silent(config), self.schedule.prompt_seconds, config)
        self._prompt_codes = torch.from_numpy(self._prompt.codes.interleaved.copy())
        bands = config.output_size
        self.state = StreamState(np.zeros(0, np.int64), 0, 0, torch.zeros(bands, 0), WaveState.start(bands))

    @property
    def ready(self) -> bool:
        """Whether the codes that came are enough for another chunk."""
        schedule, state = self.schedule, self.state
        return len(state.codes) >= state.heard + schedule.size(state.chunk) + schedule.ahead

    @property
    def missing(self) -> int:
        """How many codes are needed before anything more is heard, unless the stream is closed."""
        state = self.state
        return max(0, state.heard + self.schedule.size(state.chunk) + self.schedule.ahead - len(state.codes))

    def push(self, codes: AudioCodes) -> Audio:
        """Takes the next codes, any number of them: the sound of every chunk they complete, maybe none.

        Raises RequestError after `close`; a failed push leaves the stream as it was.
        """
        before = self.state
        self.feed(codes)
        try:
            sounds = []
            while self.ready:
                sounds += advance([self])
        except BaseException:
            self.state = before
            raise
        return _joined(sounds, self.decoder.sample_rate)

    def feed(self, codes: AudioCodes) -> None:
        """Takes the next codes and leaves the work to `advance`. Raises RequestError after `close`."""
        if self.state.closed:
            raise RequestError("this stream is closed: open a new one to decode more codes")
        self.state = replace(self.state, codes=np.concatenate([self.state.codes, codes.interleaved]))

    def close(self) -> Audio:
        """The sound of what is left. Raises RequestError if no code came or the stream is closed already."""
        if self.state.closed:
            raise RequestError("this stream is closed already")
        if len(self.state.codes) == 0:
            raise RequestError("nothing to decode: the stream is closed before any audio code came")
        sounds = []
        while self.ready:  # codes that were fed and not advanced
            sounds += advance([self])
        return _joined([*sounds, *advance([self], last=True)], self.decoder.sample_rate)

    def window(self, last: bool = False) -> Window:
        """The next run of the flow; `last` takes all codes that are left."""
        state, schedule, config = self.state, self.schedule, self.decoder.config.flow
        size = len(state.codes) - state.heard if last else schedule.size(state.chunk)
        heard = state.heard + size
        end = len(state.codes) if last else heard + schedule.ahead
        begin = max(0, state.heard - schedule.left) // code_grid(config) * code_grid(config)
        first = num_frames(begin, config)
        frames = num_frames(end - begin, config)
        skip = state.wave.frame - first
        until = frames if last else num_frames(heard, config) - first
        noise = flow_noise(self.seed, len(self._prompt.mel), first, first + frames, config.output_size)
        codes = torch.from_numpy(state.codes[begin:end].copy())
        request = FlowRequest(codes, self._prompt_codes, self._prompt.mel, self._prompt.embedding, noise)
        steps = schedule.num_steps if state.chunk else schedule.first_steps
        return Window(request, steps, skip, max(0, until - skip), heard, last)


@torch.inference_mode()
def advance(streams: Sequence[DecoderStream], last: bool = False) -> list[Audio]:
    """The next chunk of several streams of one decoder and schedule as one batch; with `last`, their rest.

    Each must be `ready` (or be closed by this); a stream sounds the same alone.
    """
    if not streams:
        return []
    decoder, schedule = streams[0].decoder, streams[0].schedule
    windows = [stream.window(last) for stream in streams]
    mels: list[Tensor] = [torch.empty(0)] * len(windows)
    for steps in sorted({window.num_steps for window in windows}):
        rows = [row for row, window in enumerate(windows) if window.num_steps == steps]
        for row, mel in zip(rows, decoder.flow.generate([windows[row].request for row in rows], steps)):
            mels[row] = mel
    news = [
        cross_fade(stream.state.mel_tail.to(mel.device), mel[:, window.skip :].float())
        for stream, window, mel in zip(streams, windows, mels)
    ]
    chunks = [
        WaveChunk(stream.state.wave, mel, window.heard, stream.seed)
        for stream, window, mel in zip(streams, windows, news)
    ]
    sounds = []
    for stream, window, mel, (samples, wave) in zip(
        streams, windows, news, vocode(decoder.vocoding, chunks, schedule.wave_fade)
    ):
        tail = mel[:, window.heard : window.heard + schedule.mel_fade].clone()
        state = stream.state
        stream.state = StreamState(state.codes, state.chunk + 1, window.codes, tail, wave, window.last)
        sounds.append(Audio(samples.numpy(), decoder.sample_rate))
    return sounds


def device_of(decoder: SpeechDecoder) -> torch.device:
    """Where a decoder works."""
    return decoder.vocoding.device


@lru_cache(maxsize=8)
def code_grid(config: FlowConfig) -> int:
    """Steps in which a window may begin: whole groups that are nearly a whole number of frames (15 codes, 31.01)."""
    ratio = config.sample_rate / config.hop_size / config.input_frame_rate
    groups = range(LAYOUT.group, 13 * LAYOUT.group, LAYOUT.group)
    return min(groups, key=lambda codes: (round(codes * ratio % 1 / 0.05), codes))


def _silent(config: FlowConfig) -> VoicePrompt:
    return VoicePrompt(AudioCodes([]), torch.zeros(0, config.output_size), torch.zeros(config.spk_embed_dim))


def _shortened(prompt: VoicePrompt, seconds: float | None, config: FlowConfig) -> VoicePrompt:
    """The end of a prompt; codes and mel are cut at the same share, as the flow stretches one over the other."""
    if seconds is None or seconds >= prompt.codes.seconds:
        return prompt
    keep = round(seconds * LAYOUT.rate / LAYOUT.group) * LAYOUT.group
    frames = round(len(prompt.mel) * keep / len(prompt.codes))
    codes = prompt.codes.interleaved[len(prompt.codes) - keep :]
    return VoicePrompt(AudioCodes(codes), prompt.mel[len(prompt.mel) - frames :], prompt.embedding)


def _joined(sounds: Sequence[Audio], sample_rate: int) -> Audio:
    samples = [sound.samples for sound in sounds]
    return Audio(np.concatenate([np.zeros(0, np.float32), *samples]), sample_rate)
