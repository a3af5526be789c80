"""The original's tokenizer class over `DualTokenizer`, for code written against it.

New code uses `DualTokenizer`: it takes whole batches and gives `AudioCodes`.
Source of the calls and their results: formats.md sections 4.4, 6.1 and 9.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.device import use_full_float32
from tokenizer.dual import DualTokenizer, prepare


class StepAudioTokenizer:
    """`StepAudioTokenizer(folder)(waveform, sample_rate)` -> `"<audio_..><audio_..>..."`."""

    def __init__(
        self, encoder_path: str | os.PathLike[str], device: str | torch.device = "auto", dither: float = 1.0
    ) -> None:
        """`encoder_path` is the `Step-Audio-Tokenizer` folder; `auto` takes the first CUDA device, else the CPU.

        Raises CheckpointError for files that are missing or broken.
        """
        use_full_float32()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder_path = Path(encoder_path)
        self.dual = DualTokenizer.from_dir(self.encoder_path, device)
        self.dither = dither

    def __call__(self, audio: torch.Tensor | np.ndarray, sr: int) -> str:
        """The codes of a sound, ends untrimmed, as text for a chat prompt; `audio` as in `wav2token`."""
        _, linguistic, semantic = self.wav2token(audio, sr, enable_trim=False)
        return AudioCodes.merge(linguistic, semantic).to_text()

    def wav2token(
        self, audio: torch.Tensor | np.ndarray, sample_rate: int, enable_trim: bool = True
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the interleaved codes (65536 + code), then all linguistic and all semantic codes.

        audio        [C, N] or [N], floats in -1..1 or integers; channels are averaged, any rate from 8 kHz
        enable_trim  cut silence off both ends, as for voice prompts
        Raises RequestError for another shape or rate. The same sound gives the same codes every time.
        """
        samples = prepare(Audio(_to_numpy(audio), sample_rate), trim=enable_trim)
        [linguistic] = self.dual.linguistic.encode([samples], dither=self.dither, seeds=[0])
        [semantic] = self.dual.semantic.encode([samples])
        ids = AudioCodes.merge(linguistic, semantic).to_ids()
        return ids, linguistic.tolist(), semantic.tolist()


def _to_numpy(audio: torch.Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(audio, torch.Tensor):
        return np.asarray(audio)
    audio = audio.detach().cpu()
    return (audio.float() if audio.is_floating_point() else audio).numpy()
