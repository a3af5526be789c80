"""Speech chat: a conversation in, words and their sound out; and speech into words.

`StepAudio` wires the parts and loads each of them when it is first needed, once: the tokenizer for the first sound,
the chat model for the first answer, the speech model for the first spoken answer. A reply that is read, not heard,
never loads the speech model. Source: formats.md section 4.4; quirks Q4, Q26, Q41.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

from stepaudio.chat.answer import Answer
from stepaudio.chat.history import compact
from stepaudio.chat.messages import HUMAN, AudioPart, CallPart, Message, Part, from_dicts, printable
from stepaudio.chat.prompts import prompt
from stepaudio.chat.template import build_prompt
from stepaudio.chat.tools import Tool, Toolbox, ToolCall, ToolFormat
from stepaudio.chat.voice import Voice
from stepaudio.checkpoints import CHAT_DIR, TOKENIZER_DIR, TTS_DIR, require_folder
from stepaudio.lm.base import LanguageModel, SamplingParams, StopReason
from stepaudio.lm.open import open_lm
from stepaudio.lm.vocab import Vocab
from stepaudio.tts.engine import MAX_SEED, StepAudioTTS
from stepaudio.tts.engine import load_parts as load_tts_parts
from stepaudio.tts.speakers import SpeakerPrompt
from tokenizer.audio import Audio, read_audio
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError

# The release's values; a guard against endless repetition besides.
CHAT_SAMPLING = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=2048, loop_guard=50)
ASR_SAMPLING = replace(CHAT_SAMPLING, temperature=0.0, loop_guard=25)

Sound = Audio | AudioCodes | str | os.PathLike[str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatRequest:
    """What to answer, and how."""

    messages: Sequence[Message | Mapping[str, Any]]  # see `from_dicts`
    speaker: str | None = None  # a registered voice; None takes the first
    clone: Mapping[str, Any] | SpeakerPrompt | None = None  # {"speaker", "prompt_text", "wav_path"} instead
    seed: int = 0
    speed: float = 1.0  # 0.5 to 2, pitch kept
    volume: float = 1.0  # 0.1 to 10
    text_only: bool = False
    sampling: SamplingParams = CHAT_SAMPLING  # stop ids and seed in it are filled in by the engine
    tools: Sequence[Tool] = ()
    trim_history: bool = False  # leave out the oldest turns where the context is too small
    keep_audio: bool = False  # earlier turns stay sound although their transcripts are known
    cancelled: Callable[[], bool] | None = None  # asked between tokens and before the last words are spoken


@dataclass(frozen=True, eq=False)
class Reply:
    """A finished reply."""

    text: str
    audio: Audio | None  # None if it is not to be heard, or holds nothing to say
    calls: tuple[ToolCall, ...]  # tools that were called for it
    stop: StopReason
    messages: tuple[Message, ...]  # the conversation with the reply: put the next human turn behind it
    problems: tuple[str, ...]  # what was doubtful; empty if nothing was
    timings: Mapping[str, float]  # seconds: listen, first_token, generate, tools, speak


class StepAudio:
    """Answers conversations and writes down speech. The parts are injected; `from_dir` takes a release folder."""

    def __init__(
        self,
        lm: Callable[[], LanguageModel],
        vocab: Vocab,
        tokenizer: Callable[[], DualTokenizer],
        tts: Callable[[], StepAudioTTS],
        *,
        text_only: bool = False,
        batch_size: int = 8,
        dither: float = 1.0,
        tool_format: ToolFormat | None = None,
    ) -> None:
        """The three models are functions, called when a model is first needed and not again.

        text_only    no reply is spoken
        batch_size   clips that are transcribed together
        dither       noise of the linguistic tokenizer's features, drawn from the request's seed
        tool_format  how tool calls are written
        """
        if batch_size < 1:
            raise RequestError(f"batch_size {batch_size} must be at least 1")
        self.vocab = vocab
        self._lm, self._tokenizer, self._tts = map(functools.cache, (lm, tokenizer, tts))
        self._text_only, self._batch_size, self._dither = text_only, batch_size, dither
        self._tool_format = tool_format or ToolFormat()
        self._delimiters = self._tool_format.delimiters(vocab)

    @classmethod
    def from_dir(
        cls,
        root: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> StepAudio:
        """The models of a release folder, each loaded when it is first needed; `dtype` is that of the large ones.

        `options` are those of `load_parts`, which also says what is raised.
        """
        folders = (Path(root) / name for name in (CHAT_DIR, TTS_DIR, TOKENIZER_DIR))
        return cls(**load_parts(*folders, device, dtype, **options))

    @property
    def lm(self) -> LanguageModel:
        return self._lm()

    @property
    def tokenizer(self) -> DualTokenizer:
        return self._tokenizer()

    @property
    def tts(self) -> StepAudioTTS:
        return self._tts()

    def reply(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> Reply:
        """The whole answer to a conversation, spoken in one go; `options` are the fields of `ChatRequest`.

        Raises RequestError for a message, voice, value or length that cannot be served, before anything is
        generated, and for tool calls that the model cannot get right.
        """
        *_, reply = self._run(ChatRequest(messages, **options), live=False)
        assert isinstance(reply, Reply)
        return reply

    def stream(
        self, messages: Sequence[Message | Mapping[str, Any]], **options: Any
    ) -> Iterator[str | Audio | ToolCall | Reply]:
        """The answer as it comes about: text, the sound of each sentence once its words are there, tool calls that
        were made, and last of all the `Reply`.

        Texts joined are the reply's text; sounds follow each other without a gap. Stopping early, by `cancelled` or
        by closing the iterator, ends the generation within a token. Raises as `reply` does, on the first step.
        """
        return self._run(ChatRequest(messages, **options), live=True)

    @overload
    def transcribe(self, audio: Sound, *, seed: int = ..., sampling: SamplingParams = ...) -> str: ...

    @overload
    def transcribe(self, audio: Sequence[Sound], *, seed: int = ..., sampling: SamplingParams = ...) -> list[str]: ...

    def transcribe(
        self, audio: Sound | Sequence[Sound], *, seed: int = 0, sampling: SamplingParams = ASR_SAMPLING
    ) -> str | list[str]:
        """The words of one recording or of several, in batches: paths, sounds or codes.

        The prompt `asr` is the system turn, the sound the human turn. An answer that ended for another reason than
        its end is logged. Raises RequestError for a sound that cannot be read, is too short or too long.
        """
        if isinstance(audio, Audio | AudioCodes | str | os.PathLike):
            return self.transcribe([audio], seed=seed, sampling=sampling)[0]
        parts = [AudioPart(Path(item) if isinstance(item, str | os.PathLike) else item) for item in audio]
        turns = self._listen([Message(HUMAN, (part,)) for part in parts], seed)
        prompts = [build_prompt(self.vocab, [prompt("asr"), turn]) for turn in turns]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            params = [self._asr_params(prompts[i], sampling, seed) for i in rows]
            for i, completion in zip(rows, self.lm.generate([prompts[i] for i in rows], params)):
                texts[i] = printable(self.vocab.decode(completion.ids)).strip()
                if completion.stop is not StopReason.STOP:
                    _log.warning("transcript of item %d may be incomplete, it ended by %s", i, completion.stop.value)
        return texts

    def _asr_params(self, ids: Sequence[int], sampling: SamplingParams, seed: int) -> SamplingParams:
        room = self.lm.max_context - len(ids)
        if room < 1:
            raise RequestError(
                f"the recording has {len(ids):,} tokens, {1 - room:,} over the context of {self.lm.max_context:,}: "
                f"cut it ({LAYOUT.rate:.0f} tokens are a second)"
            )
        limit = min(sampling.max_new_tokens, room)
        return replace(sampling, stop_ids=(self.vocab.eot,), seed=seed, max_new_tokens=limit)

    def _run(self, request: ChatRequest, live: bool) -> Iterator[str | Audio | ToolCall | Reply]:
        messages = _checked(request)
        toolbox = Toolbox(request.tools, self._tool_format)
        voice = self._voice(request, live)
        begin = time.perf_counter()
        messages = self._listen(messages if request.keep_audio else compact(messages), request.seed)
        listened = time.perf_counter() - begin
        answer = Answer(
            self.lm,
            self.vocab,
            messages,
            replace(request.sampling, seed=request.seed),
            toolbox,
            self._delimiters,
            trim=request.trim_history,
            cancelled=request.cancelled,
        )
        text = ""
        for output in answer.run():
            if isinstance(output, str):
                text += output
            if isinstance(output, str | ToolCall):
                yield output
            if voice is not None:
                yield from _spoken(voice, output, live)
        if request.cancelled is not None and request.cancelled():
            answer.stop = StopReason.CANCELLED
        if voice is not None and answer.stop is not StopReason.CANCELLED:
            yield from voice.flush()
        yield _reply(text, answer, voice, listened)

    def _voice(self, request: ChatRequest, live: bool) -> Voice | None:
        if self._text_only or request.text_only:
            return None
        return Voice(
            self.tts,
            request.speaker,
            request.clone,
            seed=request.seed,
            speed=request.speed,
            volume=request.volume,
            live=live,
        )

    def _listen(self, messages: Sequence[Message], seed: int) -> list[Message]:
        """The messages with every sound as codes; files are read before any model is loaded."""
        sounds = {
            part: read_audio(part.audio) if isinstance(part.audio, Path) else part.audio
            for message in messages
            for part in message.parts
            if isinstance(part, AudioPart) and not isinstance(part.audio, AudioCodes)
        }
        codes: dict[Part, AudioCodes] = {}
        if sounds:
            codes = dict(zip(sounds, self.tokenizer.encode(list(sounds.values()), dither=self._dither, seed=seed)))
        for part, audio in sounds.items():
            if not len(codes[part]):
                raise RequestError(
                    f"{part.audio if isinstance(part.audio, Path) else 'a sound'} lasts {audio.seconds:.3f} s, too "
                    f"short to hold speech: at least {LAYOUT.group_seconds} s are needed"
                )
        return [
            message.with_parts([replace(part, audio=codes[part]) if part in codes else part for part in message.parts])
            for message in messages
        ]


def load_parts(
    folder: Path,
    tts_folder: Path,
    tokenizer_folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    lm: LanguageModel | None = None,
    tts: StepAudioTTS | None = None,
    lm_options: Mapping[str, Any] | None = None,
    tts_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of `StepAudio`, from the folders of the chat model, the speech model and the tokenizer.

    lm, tts      used instead of those in the folders (a server, quantised ones)
    lm_options   of `open_lm`: engine, precision, device_map, max_memory ...
    tts_options  of `stepaudio.tts.engine.load_parts`: speakers, cache_dir ...
    options      of the constructor, passed through
    Raises CheckpointError at once for a folder that is not there, for what is in it when it is loaded.
    """
    require_folder(folder, "chat")
    if tts is None and not options.get("text_only", False):
        require_folder(tts_folder, "tts")
    tokenizer = functools.cache(lambda: DualTokenizer.from_dir(tokenizer_folder, device))

    def load_tts() -> StepAudioTTS:
        if tts is not None:
            return tts
        shared = {"tokenizer": tokenizer(), "dither": options.get("dither", 1.0), **(tts_options or {})}
        return StepAudioTTS(**load_tts_parts(tts_folder, tokenizer_folder, device, dtype, **shared))

    return {
        "lm": lambda: lm or open_lm(folder, device, dtype, **(lm_options or {})),
        "vocab": Vocab.from_file(folder),
        "tokenizer": tokenizer,
        "tts": load_tts,
        **options,
    }


def _checked(request: ChatRequest) -> list[Message]:
    """The request's messages. Raises RequestError for none, an empty human turn and a seed outside its range."""
    seed = request.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed {seed!r} must be a whole number in 0..{MAX_SEED}")
    messages = from_dicts(request.messages)
    if not messages:
        raise RequestError("the conversation is empty: give at least one human message")
    for i, message in enumerate(messages):
        if message.role == HUMAN and message.empty:
            raise RequestError(f"message {i + 1}: the human turn is empty: give words or sound")
    return messages


def _spoken(voice: Voice, output: str | AudioCodes | CallPart | ToolCall, live: bool) -> list[Audio]:
    """The sound that an output brings about."""
    if isinstance(output, str):
        return voice.push(output)
    if isinstance(output, AudioCodes):
        return voice.play(output)
    return voice.flush() if live and isinstance(output, CallPart) else []


def _reply(text: str, answer: Answer, voice: Voice | None, listened: float) -> Reply:
    return Reply(
        text=text,
        audio=voice.audio if voice is not None else None,
        calls=tuple(answer.calls),
        stop=answer.stop,
        messages=tuple(answer.messages),
        problems=(*answer.problems, *(voice.problems if voice is not None else ())),
        timings={**answer.timings, "listen": listened, "speak": voice.seconds if voice is not None else 0.0},
    )
