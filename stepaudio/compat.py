"""The engines under the original's names, constructors and calls: what `from stepaudio import ...` gives.

Each class is its engine. The constructor takes the original's separate folders, which may lie anywhere, and
`from_dir` one folder with all of them; calling an instance does what the original's call did, and the engine's own
methods (`synthesize`, `reply`, `stream`, `transcribe`) are there as well.
Source of the calls and their results: formats.md sections 4.4, 4.5, 8 and 10 (Q20, Q24 to Q26).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from stepaudio.chat import engine as chat
from stepaudio.chat.messages import Message
from stepaudio.checkpoints import CHAT_DIR, SPEAKERS_DIR, SPEAKERS_FILE, TOKENIZER_DIR, TTS_DIR
from stepaudio.device import device_map_for, resolve_device, resolve_dtype
from stepaudio.lm.base import AUTO
from stepaudio.tts import engine as tts
from tokenizer.compat import StepAudioTokenizer
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError

PathLike = str | os.PathLike[str]


class StepAudioTTS(tts.StepAudioTTS):
    """The speech engine. `StepAudioTTS(model_path, encoder)(text, speaker)` -> (waveform, sample rate)."""

    def __init__(
        self,
        model_path: PathLike,
        encoder: StepAudioTokenizer | DualTokenizer | PathLike | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        """`model_path` is the speech model's folder; `options` are those of `stepaudio.tts.engine.load_parts`.

        encoder  the tokenizer or its folder; by default `Step-Audio-Tokenizer` beside the speech model
        Voices are read from `speakers/` in the model's folder or else, as in the original, in the current one.
        Raises CheckpointError for missing or damaged files.
        """
        folder, device = Path(model_path), resolve_device(device)
        tokenizer_folder = folder.parent / TOKENIZER_DIR
        if isinstance(encoder, StepAudioTokenizer):
            tokenizer_folder, encoder = encoder.encoder_path, encoder.dual
        if isinstance(encoder, DualTokenizer):
            options.setdefault("tokenizer", encoder)
        elif encoder is not None:
            tokenizer_folder = Path(encoder)
        if not (folder / SPEAKERS_DIR).is_dir() and Path(SPEAKERS_DIR, SPEAKERS_FILE).is_file():
            options.setdefault("speakers", Path(SPEAKERS_DIR))
        parts = tts.load_parts(folder, tokenizer_folder, device, resolve_dtype(dtype, device), **options)
        super().__init__(**parts)

    @classmethod
    def from_dir(
        cls, root: PathLike, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", **options: Any
    ) -> StepAudioTTS:
        """From the folder that holds `Step-Audio-TTS-3B` and `Step-Audio-Tokenizer`."""
        return cls(Path(root) / TTS_DIR, Path(root) / TOKENIZER_DIR, device=device, dtype=dtype, **options)

    def __call__(
        self, text: str, prompt_speaker: str | None, clone_dict: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, int]:
        """Speech of a text as float32 [1, N] on the CPU, and its rate; a clone takes the place of the speaker."""
        speech = self.synthesize(text, None if clone_dict else prompt_speaker, clone_dict or None)
        return torch.from_numpy(speech.audio.samples)[None], speech.audio.sample_rate


class StepAudio(chat.StepAudio):
    """The chat engine. `StepAudio(tokenizer_path, tts_path, llm_path)(messages, speaker)` -> (text, waveform, rate)."""

    def __init__(
        self,
        tokenizer_path: PathLike,
        tts_path: PathLike,
        llm_path: PathLike,
        load_in_8bit: bool = False,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        lm_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """The three folders of the release; `options` are those of `stepaudio.chat.engine.load_parts`.

        load_in_8bit  the chat model's weights as 8-bit integers (needs bitsandbytes and a CUDA device)
        A chat model that is too large for the device is spread over all CUDA devices, unless `lm_options` ask for
        the fast engine, a precision or `tensor_parallel`.
        Raises CheckpointError at once for a folder that is not there, for what is in it when it is loaded;
        RequestError for a device, dtype or package that is not there.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        lm_options = dict(lm_options or {})
        whole = lm_options.get("engine") == "fast" or lm_options.get("precision", AUTO) != AUTO
        whole = whole or lm_options.get("tensor_parallel") is not None
        if "device_map" not in lm_options and options.get("lm") is None and not whole:
            lm_options["device_map"] = device_map_for(llm_path, device, dtype)
        if load_in_8bit:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise RequestError("load_in_8bit needs the package bitsandbytes: pip install bitsandbytes")
            lm_options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        parts = chat.load_parts(
            Path(llm_path), Path(tts_path), Path(tokenizer_path), device, dtype, lm_options=lm_options, **options
        )
        super().__init__(**parts)

    @classmethod
    def from_dir(
        cls, root: PathLike, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", **options: Any
    ) -> StepAudio:
        """From the folder that holds the release's three."""
        root = Path(root)
        return cls(root / TOKENIZER_DIR, root / TTS_DIR, root / CHAT_DIR, device=device, dtype=dtype, **options)

    def __call__(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        speaker_id: str | None,
        speed_ratio: float = 1.0,
        volumn_ratio: float = 1.0,
    ) -> tuple[str, torch.Tensor, int]:
        """The answer's text, its speech as float32 [1, N] on the CPU, and the rate; [1, 0] if nothing can be said."""
        reply = self.reply(messages, speaker=speaker_id, speed=speed_ratio, volume=volumn_ratio)
        if reply.audio is None:
            return reply.text, torch.zeros(1, 0), self.tts.sample_rate
        return reply.text, torch.from_numpy(reply.audio.samples)[None], reply.audio.sample_rate
