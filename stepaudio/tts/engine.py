"""Text -> speech: the 3B language model, the flow and the vocoder put together.

`StepAudioTTS` knows voices, tags and long texts. One request goes the same way as many: requests become
pieces, pieces become codes and sound in batches, doubtful pieces are drawn again, pieces are joined.
Every piece has its own seed, so a request sounds the same alone and in a batch.
Source: formats.md sections 4.5 and 8; quirks Q4 to Q7, Q22 to Q25, Q35, Q42.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cosyvoice.config import CONFIG_NAME
from cosyvoice.decoder import SPEAKER_NAME, SpeechDecoder
from cosyvoice.prompt import VoicePrompt
from cosyvoice.stream import ChunkSchedule
from stepaudio.checkpoints import ASR_DIR, FLOW_DIR, MUSIC_DIR, SPEAKERS_DIR, TOKENIZER_DIR, TTS_DIR
from stepaudio.lm.base import Completion, LanguageModel, SamplingParams
from stepaudio.lm.open import open_lm
from stepaudio.lm.vocab import Vocab
from stepaudio.tts import style
from stepaudio.tts.checks import Problem, check_codes, check_sound, duration_bounds
from stepaudio.tts.effects import change_speed, change_volume, check_effects, join
from stepaudio.tts.prompt import build_prompt
from stepaudio.tts.speakers import SpeakerPrompt, Speakers, VoiceStore, default_cache, identity_of
from stepaudio.tts.speech import TTS_SAMPLING, Piece, Speech, TTSRequest
from stepaudio.tts.split import split
from stepaudio.tts.stream import SpeechChunk, stream
from stepaudio.tts.text import normalize, validate
from tokenizer.audio import Audio
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.dual import FILES, DualTokenizer
from tokenizer.errors import RequestError, StepAudioError

T = TypeVar("T")
MAX_TOTAL = 8192  # prompt plus new tokens, as in the release
BATCH_SIZE = 8
MAX_SEED = 2**31 - 1
_SEEDS_PER_PIECE = 1000
# What to keep when every attempt has a problem: the least sum.
_WEIGHT = {"pattern": 1, "short": 2, "long": 2, "length": 3, "text": 4, "loop": 5, "silence": 6, "empty": 100}


@dataclass
class Attempt:
    """One draw of a piece."""

    seed: int
    codes: AudioCodes
    problems: list[Problem]
    audio: Audio | None = None

    @property
    def good(self) -> bool:
        """A broken 2:3 order is reported but no reason to draw again: it is decoded as it is."""
        return all(problem.kind == "pattern" for problem in self.problems)

    @property
    def weight(self) -> int:
        return sum(_WEIGHT[problem.kind] for problem in self.problems)


@dataclass
class Take:
    """A piece under way."""

    text: str
    prompt: list[int]
    params: SamplingParams
    voice: VoicePrompt
    music: bool
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def best(self) -> Attempt:
        return min(self.attempts, key=lambda attempt: attempt.weight)

    @property
    def settled(self) -> bool:
        """Whether another attempt is not needed, or, without randomness, would be the same."""
        return bool(self.attempts) and (self.best.good or self.params.temperature == 0)


class StepAudioTTS:
    """Speaks texts. The parts are injected; `from_dir` puts them together from a release folder."""

    def __init__(
        self,
        lm: LanguageModel,
        vocab: Vocab,
        decoder: SpeechDecoder,
        music_decoder: Callable[[], SpeechDecoder],
        voices: VoiceStore,
        speakers: Speakers,
        *,
        max_attempts: int = 3,
        batch_size: int = BATCH_SIZE,
        decode_batch_size: int = 1,
        max_piece_seconds: float = 20.0,
        release_sampling: bool = False,
    ) -> None:
        """`music_decoder` is called when rap or humming is first asked for.

        max_attempts       how often a piece with a problem is drawn, each time with the next seed
        batch_size         pieces the language model draws together
        decode_batch_size  pieces the flow and the vocoder make together; above 1 the samples change by
                           rounding (2e-5 in float32), with 1 a speech has the same bytes in any batch
        max_piece_seconds  longer texts are split
        release_sampling   any id may be drawn, without a loop guard and up to 8192 tokens, and ids below
                           the audio ids become code 0, as in the release; otherwise only audio ids can be
                           drawn, in the order 2 linguistic, 3 semantic, for a plausible time
        """
        if min(max_attempts, batch_size, decode_batch_size) < 1:
            raise RequestError(
                f"max_attempts {max_attempts}, batch_size {batch_size} and decode_batch_size {decode_batch_size} "
                "must be at least 1"
            )
        self.lm, self.vocab, self.decoder, self.speakers = lm, vocab, decoder, speakers
        self.max_attempts, self.batch_size, self.decode_batch_size = max_attempts, batch_size, decode_batch_size
        self.max_piece_seconds, self.release_sampling = max_piece_seconds, release_sampling
        self.music_decoder, self.voices = music_decoder, voices

    @classmethod
    def from_dir(
        cls,
        root: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> StepAudioTTS:
        """Loads the speech model of a release folder; `dtype` is the language model's and the flow's.

        `options` are those of `load_parts`, which also says what is raised.
        """
        return cls(**load_parts(Path(root) / TTS_DIR, Path(root) / TOKENIZER_DIR, device, dtype, **options))

    @property
    def sample_rate(self) -> int:
        """Of the speech, Hz."""
        return self.decoder.sample_rate

    def synthesize(
        self,
        text: str,
        speaker: str | None = None,
        clone: Mapping[str, Any] | SpeakerPrompt | None = None,
        *,
        seed: int = 0,
        speed: float = 1.0,
        volume: float = 1.0,
        sampling: SamplingParams = TTS_SAMPLING,
        allow_any_tag: bool = False,
        normalize: bool = False,
    ) -> Speech:
        """Speaks one text; the arguments are the fields of `TTSRequest`.

        Raises RequestError for a text, voice or value that cannot be served.
        """
        request = TTSRequest(text, speaker, clone, seed, speed, volume, sampling, allow_any_tag, normalize)
        [speech] = self.synthesize_batch([request])
        if isinstance(speech, StepAudioError):
            raise speech
        return speech

    def synthesize_batch(self, requests: Sequence[TTSRequest]) -> list[Speech | StepAudioError]:
        """Speaks several texts together; one that cannot be served gives its error instead of a speech."""
        plans: list[list[Take] | StepAudioError] = []
        for request in requests:
            try:
                plans.append(self.plan(request))
            except StepAudioError as error:
                plans.append(error)
        self._perform([take for plan in plans if isinstance(plan, list) for take in plan])
        return [_finish(request, plan) if isinstance(plan, list) else plan for request, plan in zip(requests, plans)]

    def stream(
        self,
        request: TTSRequest | str,
        *,
        schedule: ChunkSchedule | None = None,
        threads: bool | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[SpeechChunk, None, None]:
        """Speaks one text while it is still drawn, see `stepaudio.tts.stream.stream`.

        Raises RequestError, before anything is drawn, for a text, voice or value that cannot be served.
        """
        request = TTSRequest(request) if isinstance(request, str) else request
        return stream(self, request, schedule, threads, cancelled)

    def plan(self, request: TTSRequest) -> list[Take]:
        """Checks everything about a request and cuts it into pieces."""
        styled, words, speaker = examine(request, self.speakers)
        voice = self.voices.get(speaker.wav_path)
        if styled.music:
            self.music_decoder()  # a missing music flow is this request's error
        takes = []
        for i, piece in enumerate(split(words, self.max_piece_seconds)):
            prompt = build_prompt(
                self.vocab,
                styled.prefix + piece,
                speaker.prompt_text,
                voice.codes,
                speaker="" if request.clone is not None else speaker.speaker,
                music=styled.music,
            )
            params = self._params(request.sampling, len(prompt), piece, styled.music is not None)
            params = replace(params, seed=request.seed + i * _SEEDS_PER_PIECE)
            takes.append(Take(piece, prompt, params, voice, styled.music is not None))
        return takes

    def _params(self, sampling: SamplingParams, used: int, text: str, music: bool) -> SamplingParams:
        """What may be drawn after a prompt of `used` tokens."""
        limit = min(MAX_TOTAL, self.lm.max_context)
        if used + LAYOUT.group > limit:
            raise RequestError(
                f"the prompt has {used} tokens, {used + LAYOUT.group - limit} over the limit of {limit}: "
                "take a shorter recording of the voice or a shorter text"
            )
        sampling = replace(sampling, stop_ids=(self.vocab.eot,), allowed=(), cycle=())
        if self.release_sampling:
            return replace(sampling, max_new_tokens=limit - used, loop_guard=0)
        base = self.vocab.audio_base
        plausible = int(duration_bounds(text, music)[1] * LAYOUT.rate)
        room = min(limit - used, plausible) // LAYOUT.group * LAYOUT.group
        cycle = tuple((base + first, base + end) for first, end in LAYOUT.pattern)
        return replace(sampling, max_new_tokens=room, cycle=cycle)

    def _perform(self, takes: Sequence[Take]) -> None:
        """Draws every piece, the doubtful ones up to `max_attempts` times with the next seed, and decodes it."""
        for number in range(self.max_attempts):
            todo = [take for take in takes if not take.settled]
            for batch in _chunks(sorted(todo, key=lambda take: len(take.prompt)), self.batch_size):
                self._draw(batch, number)
            self._decode([(take, take.attempts[-1]) for take in todo if take.attempts[-1].good])
        self._decode([(take, take.best) for take in takes if take.best.audio is None and len(take.best.codes)])

    def _draw(self, takes: Sequence[Take], number: int) -> None:
        """One more attempt at each piece: its codes and what they show."""
        params = [replace(take.params, seed=(take.params.seed or 0) + number) for take in takes]
        completions = self.lm.generate([take.prompt for take in takes], params)
        for take, param, completion in zip(takes, params, completions):
            take.attempts.append(self.judge(take, param.seed or 0, completion))

    def judge(self, take: Take, seed: int, completion: Completion) -> Attempt:
        """What a completion for a piece is worth: its codes and what they show."""
        codes = self.codes(completion.ids)
        problems = check_codes(codes, completion.stop, take.text, take.music)
        if strays := len(completion.ids) - len(codes):
            problems.append(Problem("text", f"{strays} tokens were no audio codes and are left out"))
        return Attempt(seed, codes, problems)

    def codes(self, ids: Iterable[int]) -> AudioCodes:
        """Audio codes of drawn tokens; those that are none are left out."""
        codes = (index - self.vocab.audio_base for index in ids)
        if self.release_sampling:
            codes = (max(code, 0) for code in codes)
        return AudioCodes([code for code in codes if 0 <= code < LAYOUT.size])

    def _decode(self, attempts: Sequence[tuple[Take, Attempt]]) -> None:
        """Codes to sound, in batches, music by the music flow."""
        for music in (False, True):
            chosen = [(take, attempt) for take, attempt in attempts if take.music is music]
            for batch in _chunks(sorted(chosen, key=lambda pair: len(pair[1].codes)), self.decode_batch_size):
                decoder = self.music_decoder() if music else self.decoder
                sounds = decoder.decode(
                    [attempt.codes for _, attempt in batch],
                    [take.voice for take, _ in batch],
                    [attempt.seed for _, attempt in batch],
                )
                for (_, attempt), audio in zip(batch, sounds):
                    attempt.audio = audio
                    attempt.problems += check_sound(audio)


def examine(request: TTSRequest, speakers: Speakers) -> tuple[style.StyledText, str, SpeakerPrompt]:
    """Everything about a request that needs no model: its tags, its words and the voice it asks for.

    Raises RequestError for whatever in it cannot be served.
    """
    if isinstance(request.seed, bool) or not isinstance(request.seed, int) or not 0 <= request.seed <= MAX_SEED:
        raise RequestError(f"seed {request.seed!r} must be a whole number in 0..{MAX_SEED}")
    check_effects(request.speed, request.volume)
    styled = style.parse(validate(request.text), request.allow_any_tag)
    words = validate(normalize(styled.text) if request.normalize else styled.text)
    if request.clone is None:
        return styled, words, speakers.find(request.speaker, styled.music)
    if request.speaker is not None:
        raise RequestError("give either a speaker or a clone, not both")
    clone = request.clone
    return styled, words, clone if isinstance(clone, SpeakerPrompt) else SpeakerPrompt.from_dict(clone)


def _finish(request: TTSRequest, takes: Sequence[Take]) -> Speech | StepAudioError:
    """The pieces of one request joined, with its speed and volume."""
    sounds, pieces = [], []
    for take in takes:
        best = take.best
        if best.audio is None:
            return RequestError(
                f"the model gave no sound for {take.text[:40]!r} in {len(take.attempts)} attempts: "
                "try another seed or other words"
            )
        sounds.append(best.audio)
        pieces.append(Piece(take.text, best.seed, best.codes, tuple(best.problems), len(take.attempts)))
    audio = change_volume(change_speed(join(sounds), request.speed), request.volume)
    return Speech(audio, tuple(pieces))


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def load_parts(
    folder: Path,
    tokenizer_folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    lm: LanguageModel | None = None,
    lm_options: Mapping[str, Any] | None = None,
    tokenizer: DualTokenizer | None = None,
    speakers: Speakers | str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dither: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of `StepAudioTTS`, loaded from the speech model's folder and the tokenizer's.

    lm         used instead of the model in the folder (a server, say)
    lm_options of `open_lm`: engine, precision ...
    tokenizer  used instead of the one in `tokenizer_folder`, which is opened when a new voice is met
    speakers   a folder or JSON file; by default `speakers/` in the speech model's folder, if there
    cache_dir  where voice prompts are kept; by default ~/.cache/stepaudio/voices
    options    of the constructor, passed through; on a GPU decode_batch_size is batch_size unless given
    Raises CheckpointError for missing or damaged files, RequestError for bad speakers.
    """
    vocab = Vocab.from_file(folder)
    decoder = SpeechDecoder.from_dir(folder / FLOW_DIR, device, dtype)
    listener = functools.cache(lambda: tokenizer or DualTokenizer.from_dir(tokenizer_folder, device))
    voices = VoiceStore(
        lambda audio: decoder.voice_prompt(audio, listener(), dither=dither),
        f"{identity_of(_voice_files(folder, tokenizer_folder))} dither {dither}",
        default_cache() if cache_dir is None else Path(cache_dir),
    )
    if torch.device(device).type == "cuda":
        options = {"decode_batch_size": options.get("batch_size", BATCH_SIZE), **options}
    if speakers is None:
        speakers = folder / SPEAKERS_DIR if (folder / SPEAKERS_DIR).is_dir() else Speakers()
    return {
        "lm": lm or open_lm(folder, device, dtype, **(lm_options or {})),
        "vocab": vocab,
        "decoder": decoder,
        "music_decoder": functools.cache(lambda: SpeechDecoder.from_dir(folder / MUSIC_DIR, device, dtype)),
        "voices": voices,
        "speakers": speakers if isinstance(speakers, Speakers) else Speakers.from_path(speakers),
        **options,
    }


def _voice_files(folder: Path, tokenizer_folder: Path) -> list[Path]:
    """Every file a voice prompt depends on."""
    listening = [*FILES, f"{ASR_DIR}/config.yaml"]
    speaking = [SPEAKER_NAME, CONFIG_NAME]
    return [
        *(tokenizer_folder / name for name in listening),
        *(folder / FLOW_DIR / name for name in speaking),
    ]
