"""The dual tokenizer: any sound -> the interleaved codes that the language model reads.

Puts both tokenizers on the same 16 kHz samples and merges their streams 2:3. Knows nothing about ids,
text or prompts. Source: formats.md sections 1.1, 6.1 and 9.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from tokenizer.audio import TOKENIZER_RATE, Audio, normalize_peak, resample, trim_silence
from tokenizer.codes import AudioCodes
from tokenizer.errors import CheckpointError
from tokenizer.linguistic import ASR_DIR, CENTROIDS_FILE, LinguisticTokenizer
from tokenizer.semantic import SemanticTokenizer

SEMANTIC_FILE = "speech_tokenizer_v1.onnx"
FILES = (CENTROIDS_FILE, SEMANTIC_FILE, f"{ASR_DIR}/model.pt", f"{ASR_DIR}/am.mvn")


class DualTokenizer:
    """Both tokenizers of `Step-Audio-Tokenizer`."""

    def __init__(self, linguistic: LinguisticTokenizer, semantic: SemanticTokenizer) -> None:
        self.linguistic = linguistic
        self.semantic = semantic

    @classmethod
    def from_dir(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        semantic_backend: str = "torch",
        engine: str = "auto",
    ) -> DualTokenizer:
        """From the folder as released. Raises CheckpointError that names all missing files, or the broken one.

        `engine`: "auto" batches and captures graphs on a CUDA device, "plain" runs the modules as they are written.
        """
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} is not a whole Step-Audio-Tokenizer folder: missing {', '.join(missing)}: "
                "download them or check --model-path"
            )
        return cls(
            LinguisticTokenizer.from_dir(folder, device, engine),
            SemanticTokenizer.from_file(folder / SEMANTIC_FILE, device, semantic_backend, engine),
        )

    @overload
    def encode(self, audio: Audio, trim: bool = ..., dither: float = ..., seed: int = ...) -> AudioCodes: ...

    @overload
    def encode(
        self, audio: Sequence[Audio], trim: bool = ..., dither: float = ..., seed: int = ...
    ) -> list[AudioCodes]: ...

    def encode(
        self, audio: Audio | Sequence[Audio], trim: bool = False, dither: float = 1.0, seed: int = 0
    ) -> AudioCodes | list[AudioCodes]:
        """One clip, or several as one batch with the results of single calls.

        `trim` cuts silence off both ends, as is done for voice prompts. `dither` is the noise the
        linguistic features get, in int16 steps; every clip draws it from `seed` anew. Sound under 90 ms
        gives empty AudioCodes (trim adds silence, and with it codes, to any sound that has samples).
        """
        if isinstance(audio, Audio):
            return self.encode([audio], trim, dither, seed)[0]
        clips = [prepare(clip, trim) for clip in audio]
        linguistic = self.linguistic.encode(clips, dither=dither, seeds=[seed] * len(clips))
        return [AudioCodes.merge(*pair) for pair in zip(linguistic, self.semantic.encode(clips))]


def prepare(audio: Audio, trim: bool = False) -> np.ndarray:
    """What both tokenizers hear: float32 [N] at 16 kHz, peak 0.999, with or without silence at the ends."""
    samples = normalize_peak(resample(audio, TOKENIZER_RATE).samples)
    return trim_silence(samples) if trim else samples
