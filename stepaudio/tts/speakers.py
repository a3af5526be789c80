"""Voices to speak with: who is registered, how a cloned one is given, and their prompts on disk.

Knows recordings and their texts. How a recording becomes a `VoicePrompt` is handed in.
Source of the file forms and of the music voices: formats.md section 8.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from cosyvoice.prompt import VoicePrompt
from stepaudio.checkpoints import SPEAKERS_FILE
from stepaudio.tts.style import HUMMING, RAP
from tokenizer.audio import TOKENIZER_RATE, Audio, read_audio
from tokenizer.errors import CheckpointError, RequestError

MIN_SECONDS, MAX_SECONDS = 0.5, 60.0
GOOD_SECONDS = (1.0, 30.0)
_SILENT_PEAK, _QUIET_RMS = 0.003, 0.01
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.99, 0.001
_SPEECH_SHARE = 0.3  # of 20 ms frames within 40 dB of the loudest
_IDENTITY_BYTES = 2**16
_KEPT_IN_MEMORY = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeakerPrompt:
    """A voice by its recording: the name, the words of the recording, the sound file."""

    speaker: str
    prompt_text: str
    wav_path: Path

    @classmethod
    def from_dict(cls, row: Any, folder: Path = Path(), what: str = "clone") -> SpeakerPrompt:
        """From `{"speaker", "prompt_text", "wav_path"}`, the speaker optional; paths are relative to `folder`.

        Raises RequestError for a missing or wrong field and a missing sound file.
        """
        if not isinstance(row, Mapping):
            raise RequestError(f'{what} must be an object {{"speaker", "prompt_text", "wav_path"}}, not {row!r:.60}')
        for field in ("prompt_text", "wav_path"):
            value = row.get(field)
            if not isinstance(value, str | os.PathLike) or not str(value).strip():
                raise RequestError(f"{what}: {field!r} is missing or empty: it must be a string")
        name = row.get("speaker", "")
        if not isinstance(name, str):
            raise RequestError(f"{what}: 'speaker' must be a string, not {name!r}")
        path = folder / row["wav_path"]
        if not path.is_file():
            raise RequestError(f"{what}: the recording {path} does not exist")
        return cls(name, str(row["prompt_text"]), path)


class Speakers:
    """The registered voices. A music voice of `Ann` is registered as `AnnRAP` or `Ann哼唱`."""

    def __init__(self, prompts: Iterable[SpeakerPrompt] = ()) -> None:
        """Raises RequestError for a name that is empty or given twice."""
        self._prompts: dict[str, SpeakerPrompt] = {}
        for prompt in prompts:
            if not prompt.speaker or prompt.speaker in self._prompts:
                raise RequestError(f"speaker name {prompt.speaker!r} is empty or given twice")
            self._prompts[prompt.speaker] = prompt

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Speakers:
        """Reads a folder with speakers_info.json, or a JSON file of either form.

        `{id: prompt_text}` has the sound in `{id}_prompt.wav` beside the file;
        `[{"speaker", "prompt_text", "wav_path"}, ...]` names it. Raises RequestError saying what is wrong.
        """
        path = Path(path)
        file = path / SPEAKERS_FILE if path.is_dir() else path
        if not file.is_file():
            raise RequestError(f"speakers: {file} does not exist")
        try:
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, OSError) as error:
            raise RequestError(f"speakers: {file} is not valid JSON ({error})") from None
        if isinstance(rows, dict):
            rows = [
                {"speaker": name, "prompt_text": text, "wav_path": f"{name}_prompt.wav"} for name, text in rows.items()
            ]
        if not isinstance(rows, list):
            raise RequestError(f"speakers: {file} must hold an object {{id: prompt_text}} or a list of objects")
        return cls(
            SpeakerPrompt.from_dict(row, file.parent, f"speakers: {file}, {_label(row, i)}")
            for i, row in enumerate(rows)
        )

    @property
    def names(self) -> list[str]:
        """Speakers without the music voices that belong to them."""
        return [name for name in self._prompts if self._owner(name) is None]

    def music_of(self, name: str) -> list[str]:
        """The music tags for which a speaker has a voice."""
        return [tag for tag in (RAP, HUMMING) if name + tag in self._prompts]

    def find(self, name: str | None, music: str | None = None) -> SpeakerPrompt:
        """The voice of a speaker (None: the first), for music the one registered for that.

        Raises RequestError for an unknown speaker or one without that music voice.
        """
        if not self._prompts:
            raise RequestError("no speakers are registered: give --speaker-json, or clone a voice from a recording")
        name = self.names[0] if name is None else name
        if name not in self._prompts:
            near = difflib.get_close_matches(name, self._prompts, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RequestError(f"unknown speaker {name!r}: {hint}known: {', '.join(self._prompts)}")
        if music is None or self._owner(name) is not None:
            return self._prompts[name]
        if name + music not in self._prompts:
            raise RequestError(
                f"speaker {name!r} has no voice for {music}: register {name + music!r} with a recording of "
                f"{'rap' if music == RAP else 'singing'}, or clone a voice for this text"
            )
        return self._prompts[name + music]

    def _owner(self, name: str) -> str | None:
        """The speaker a music voice belongs to."""
        for tag in (RAP, HUMMING):
            if name.endswith(tag) and name.removesuffix(tag) in self._prompts:
                return name.removesuffix(tag)
        return None


class VoiceStore:
    """Voice prompts of sound files: from memory, else from disk, else made and kept in both.

    The key is the content of the sound file plus the identity of the models that make the prompt.
    """

    def __init__(self, make: Callable[[Audio], VoicePrompt], identity: str, folder: Path | None) -> None:
        """`make` turns a recording into a prompt; `folder` None keeps nothing on disk."""
        self._make = make
        self._identity = identity
        self._folder = folder
        self._memory: OrderedDict[str, VoicePrompt] = OrderedDict()

    def get(self, wav_path: Path) -> VoicePrompt:
        """The prompt of a recording; what is doubtful about it is logged when it is made.

        Raises RequestError for a recording that cannot serve (see `check_recording`).
        """
        try:
            content = wav_path.read_bytes()
        except OSError as error:
            raise RequestError(f"cannot read the recording {wav_path}: {error.strerror}") from None
        key = hashlib.sha256(self._identity.encode() + content).hexdigest()[:32]
        prompt = self._memory.pop(key, None) or self._load(key) or self._create(wav_path, key)
        self._memory[key] = prompt
        if len(self._memory) > _KEPT_IN_MEMORY:
            self._memory.popitem(last=False)
        return prompt

    def _load(self, key: str) -> VoicePrompt | None:
        if self._folder is None or not (path := self._folder / f"{key}.safetensors").is_file():
            return None
        try:
            return VoicePrompt.load(path)
        except CheckpointError as error:
            _log.warning("making a voice prompt again: %s", error)
            return None

    def _create(self, wav_path: Path, key: str) -> VoicePrompt:
        audio = read_audio(wav_path)
        for warning in check_recording(audio, soundfile.info(wav_path).channels, str(wav_path)):
            _log.warning("%s", warning)
        prompt = self._make(audio)
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                prompt.save(self._folder / f"{key}.safetensors")
            except (RequestError, OSError) as error:
                _log.warning("the voice prompt is not kept on disk: %s", error)
        return prompt


def check_recording(audio: Audio, channels: int = 1, name: str = "recording") -> list[str]:
    """What is doubtful about a recording as a voice prompt, each with its remedy.

    Raises RequestError for one under 0.5 s, over 60 s, or silent.
    """
    if not MIN_SECONDS <= audio.seconds <= MAX_SECONDS:
        raise RequestError(
            f"{name} lasts {audio.seconds:.2f} s, a voice needs {MIN_SECONDS:g} to {MAX_SECONDS:g} s: "
            "give 3 to 10 s of clear speech"
        )
    level = np.abs(audio.samples)
    if level.max() < _SILENT_PEAK:
        raise RequestError(f"{name} is silent (peak {level.max():.4f}): give a recording with speech in it")
    low, high = GOOD_SECONDS
    size = audio.sample_rate // 50
    frames = level[: len(level) // size * size].reshape(-1, size).max(axis=1)
    findings = {
        f"lasts {audio.seconds:.1f} s, {low:g} to {high:g} s work best: use 3 to 10 s": not low
        <= audio.seconds
        <= high,
        "is clipped: record it at a lower level": float((level >= _CLIPPED_LEVEL).mean()) > _CLIPPED_SHARE,
        "is very quiet, so its noise is raised with it: record it louder or closer": float(np.std(audio.samples))
        < _QUIET_RMS,
        "is mostly silence: cut it down to the speech": float((frames > level.max() / 100).mean()) < _SPEECH_SHARE,
        f"has a rate of {audio.sample_rate} Hz, so the voice will sound dull: record at 16,000 Hz or more": (
            audio.sample_rate < TOKENIZER_RATE
        ),
        f"has {channels} channels, which are averaged: export it as mono": channels > 1,
    }
    return [f"{name} {finding}" for finding, found in findings.items() if found]


def identity_of(files: Iterable[Path]) -> str:
    """Fingerprint of model files: name, size, first and last 64 KiB of each; missing ones are left out."""
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(f"{path.name} {size}".encode() + file.read(_IDENTITY_BYTES))
                file.seek(max(0, size - _IDENTITY_BYTES))
                digest.update(file.read(_IDENTITY_BYTES))
    return digest.hexdigest()


def default_cache() -> Path:
    """~/.cache/stepaudio/voices, below XDG_CACHE_HOME if that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepaudio" / "voices"


def _label(row: Any, index: int) -> str:
    name = row.get("speaker") if isinstance(row, dict) else None
    return f"speaker {name!r}" if name else f"entry {index + 1}"
