"""A voice to speak in: what the flow model needs of a recorded clip, and its file.

The release takes the codes from the trimmed, peak-normalised clip and the mel from the untouched
one, so the two halves have different lengths and the flow model stretches the codes over the mel.
Released voices are made this way, therefore it is kept (formats.md sections 8 and 10, Q19).
Legend: n codes, T mel frames, M mel bands, D embedding width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosyvoice.config import MelConfig
from cosyvoice.mel import mel_spectrogram
from cosyvoice.speaker import SpeakerEncoder
from tokenizer.audio import Audio, resample
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.files import atomic_write, require_file

if TYPE_CHECKING:
    from tokenizer.dual import DualTokenizer

_FORMAT, _VERSION = "step-audio-voice-prompt", "1"
_NAMES = ("codes", "mel", "embedding")


@dataclass(frozen=True, eq=False)
class VoicePrompt:
    """Codes of a clip, its log-mel float32 [T, M] and its speaker embedding float32 [D], on the CPU.

    Codes and mel may both be empty: then only the embedding steers the voice. Raises RequestError
    for other shapes, for values that are not finite and when just one of codes and mel is empty.
    """

    codes: AudioCodes
    mel: Tensor
    embedding: Tensor

    def __post_init__(self) -> None:
        for name, dims in (("mel", 2), ("embedding", 1)):
            value = getattr(self, name)
            if value.ndim != dims or not value.is_floating_point():
                raise RequestError(f"voice prompt: {name} must be a float tensor of {dims} dimensions")
            if not bool(value.isfinite().all()):
                raise RequestError(f"voice prompt: {name} holds NaN or infinite values")
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32).contiguous())
        if (len(self.codes) == 0) != (len(self.mel) == 0):
            raise RequestError(
                f"voice prompt: {len(self.codes)} codes but {len(self.mel)} mel frames: give both or neither"
            )

    @classmethod
    def from_audio(
        cls,
        audio: Audio,
        tokenizer: DualTokenizer,
        speaker_encoder: SpeakerEncoder,
        mel_config: MelConfig,
        *,
        dither: float = 1.0,
        seed: int = 0,
    ) -> VoicePrompt:
        """Prompt of one clip of any rate; `dither` and `seed` go to the tokenizer.

        Raises RequestError for a clip too short for one group of codes.
        """
        codes = tokenizer.encode(audio, trim=True, dither=dither, seed=seed)
        if len(codes) == 0:
            raise RequestError(f"a clip of {audio.seconds:.2f} s is too short for a voice prompt: give 3 to 10 s")
        samples = torch.from_numpy(resample(audio, mel_config.sampling_rate).samples)
        return cls(codes, mel_spectrogram(samples, mel_config), speaker_encoder.embed(audio))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one `.safetensors` file, all or nothing."""
        path = Path(path)
        tensors = {
            "codes": torch.from_numpy(self.codes.interleaved.copy()),
            "mel": self.mel,
            "embedding": self.embedding,
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "version": _VERSION})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VoicePrompt:
        """Reads what `save` wrote, bit for bit. Raises CheckpointError for any other file."""
        path = require_file(path, "voice prompt")
        try:
            with safe_open(path, framework="pt") as file:
                _check_header(file.metadata() or {}, set(file.keys()), path)
                tensors = {name: file.get_tensor(name) for name in _NAMES}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"voice prompt: {path} is truncated or not safetensors ({error})") from None
        try:
            return cls(AudioCodes(tensors["codes"].numpy()), tensors["mel"], tensors["embedding"])
        except RequestError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None


def _check_header(metadata: dict[str, str], names: set[str], path: Path) -> None:
    if metadata.get("format") != _FORMAT or names != set(_NAMES):
        raise CheckpointError(f"{path} is not a voice prompt: make one from a clip with VoicePrompt.from_audio")
    if metadata.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is a voice prompt of version {metadata.get('version')}, this reads {_VERSION}: make it anew"
        )
