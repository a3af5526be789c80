"""The voice of one reply: words through the speech model, codes straight to the flow, piece by piece.

Knows speech synthesis, nothing of language models or conversations. What cannot be spoken is a problem that is
noted, never the end of a reply whose words are there already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from stepaudio.tts.effects import change_speed, change_volume, check_effects, join
from stepaudio.tts.engine import MAX_SEED, StepAudioTTS
from stepaudio.tts.speakers import SpeakerPrompt
from stepaudio.tts.split import finished
from stepaudio.tts.text import speakable, speech_seconds
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError, StepAudioError

SHORTEST_SECONDS = 1.0  # a sentence estimated shorter than this waits for the next
_log = logging.getLogger(__name__)


class Voice:
    """Turns the pieces of a reply into sound. Attributes: `sounds`, `problems`, `seconds` it took."""

    def __init__(
        self,
        tts: StepAudioTTS,
        speaker: str | None,
        clone: Mapping[str, Any] | SpeakerPrompt | None,
        *,
        seed: int,
        speed: float,
        volume: float,
        live: bool,
    ) -> None:
        """With `live` text is spoken sentence by sentence as it comes, else a whole stretch of it at once.

        Everything about the voice is checked here, before any answer: raises RequestError for an unknown speaker,
        a recording that cannot serve, and a ratio outside its range.
        """
        check_effects(speed, volume)
        if speaker is not None and clone is not None:
            raise RequestError("give either a speaker or a clone, not both")
        if clone is not None and not isinstance(clone, SpeakerPrompt):
            clone = SpeakerPrompt.from_dict(clone)
        self._prompt = tts.voices.get((clone or tts.speakers.find(speaker)).wav_path)
        self._tts, self._speaker, self._clone = tts, speaker, clone
        self._seed, self._speed, self._volume, self._live = seed, speed, volume, live
        self._waiting = ""
        self.sounds: list[Audio] = []
        self.problems: list[str] = []
        self.seconds = 0.0

    @property
    def audio(self) -> Audio | None:
        """All that was spoken so far."""
        return join(self.sounds) if self.sounds else None

    def push(self, text: str) -> list[Audio]:
        """More text; returns the sound of the sentences that it completes."""
        self._waiting += text
        end = finished(self._waiting) if self._live else 0
        if speech_seconds(self._waiting[:end].strip()) < SHORTEST_SECONDS:
            return []
        ready, self._waiting = self._waiting[:end], self._waiting[end:]
        return self._say(ready)

    def flush(self) -> list[Audio]:
        """The sound of the text that still waits for its end."""
        ready, self._waiting = self._waiting, ""
        return self._say(ready)

    def play(self, codes: AudioCodes) -> list[Audio]:
        """The sound of what waits and of a run of codes."""
        sounds = self.flush()
        begin = time.perf_counter()
        audio = self._tts.decoder.decode(codes, self._prompt, self._next_seed())
        audio = change_volume(change_speed(audio, self._speed), self._volume)
        return sounds + self._keep(audio, begin)

    def _say(self, text: str) -> list[Audio]:
        if not speakable(text):
            return []
        begin = time.perf_counter()
        try:
            speech = self._tts.synthesize(
                text.strip(),
                self._speaker,
                self._clone,
                seed=self._next_seed(),
                speed=self._speed,
                volume=self._volume,
                allow_any_tag=True,
            )
        except StepAudioError as error:
            _log.warning("not spoken: %r: %s", text[:40], error)
            self.problems.append(f"not spoken: {text.strip()[:40]!r}: {error}")
            return []
        self.problems += speech.problems
        return self._keep(speech.audio, begin)

    def _next_seed(self) -> int:
        """Each piece has its own, the first that of the request."""
        return min(self._seed + len(self.sounds), MAX_SEED)

    def _keep(self, audio: Audio, begin: float) -> list[Audio]:
        self.sounds.append(audio)
        self.seconds += time.perf_counter() - begin
        return [audio]
