"""The interleaved codes of every clip of a corpus, made with a trained `Step-Audio-Tokenizer` from stored features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stepaudio.train.data import Clip, Corpus
from stepaudio.train.features import RATES, Features
from tokenizer.codes import AudioCodes
from tokenizer.dual import SEMANTIC_FILE
from tokenizer.files import atomic_write
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.semantic import SemanticEncoder

LONGEST = 29.0  # seconds; longer clips get no codes


class Codes:
    """Codes by clip index; those of a clip too short for a group, or too long, are empty."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self.flat = flat
        self.ends = ends

    @classmethod
    def open(cls, folder: Path) -> Codes:
        return cls(np.load(folder / "codes.npy"), np.load(folder / "codes_ends.npy"))

    def __getitem__(self, index: int) -> AudioCodes:
        start = self.ends[index - 1] if index else 0
        return AudioCodes(self.flat[start : self.ends[index]].astype(np.int64))


class Encoder:
    """Both tokenizers on features that were made before, without the front end."""

    def __init__(self, folder: Path, corpus: Path, device: torch.device) -> None:
        self.rows = Features.open(corpus, "rows", device)
        self.log_mel = Features.open(corpus, "log_mel", device)
        self.linguistic = LinguisticTokenizer.from_dir(folder, device)
        self.semantic = SemanticEncoder.from_file(folder / SEMANTIC_FILE).to(device)
        cmvn = self.linguistic.front_end.cmvn
        self.shift, self.scale = cmvn.shift.to(device), cmvn.scale.to(device)
        self.centroids = self.linguistic.centroids.to(device)

    @torch.inference_mode()
    def __call__(self, indices: Sequence[int], seconds: float) -> list[AudioCodes]:
        """Codes of clips that last `seconds` at most."""
        streams = zip(self._linguistic(indices, seconds), self._semantic(indices, seconds))
        return [AudioCodes.merge(*pair) for pair in streams]

    def _linguistic(self, indices: Sequence[int], seconds: float) -> list[np.ndarray]:
        x, counts = self.rows.gather(indices, int(seconds * RATES["rows"]) + 2)
        valid = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        hidden = self.linguistic.encoder((x + self.shift) * self.scale * valid[..., None], counts)
        scores = hidden @ self.centroids.T - 0.5 * self.centroids.square().sum(dim=1)
        return _cut(scores.argmax(dim=-1), counts)

    def _semantic(self, indices: Sequence[int], seconds: float) -> list[np.ndarray]:
        x, lengths = self.log_mel.gather(indices, int(seconds * RATES["log_mel"]) + 2)
        hidden, counts = self.semantic(x.transpose(1, 2), lengths.clamp(min=1))
        assert counts is not None
        return _cut(self.semantic.quantize(hidden), counts)


def _cut(codes: Tensor, counts: Tensor) -> list[np.ndarray]:
    return [row[:count] for row, count in zip(codes.cpu().numpy(), counts.tolist())]


def batches(clips: Sequence[Clip], seconds: float) -> Iterator[list[int]]:
    """Clip indices, longest first, in groups that last at most `seconds` once padded."""
    order = [i for i in sorted(range(len(clips)), key=lambda i: -clips[i].length) if clips[i].seconds <= LONGEST]
    while order:
        count = max(1, int(seconds / max(0.1, clips[order[0]].seconds)))
        yield order[:count]
        order = order[count:]


def write_codes(folder: Path, tokenizer_folder: Path, device: torch.device, batch_seconds: float = 600.0) -> Codes:
    """Writes `codes.npy` and `codes_ends.npy` of a corpus that has its features `rows` and `log_mel`."""
    clips = Corpus.open(folder).clips
    encode = Encoder(tokenizer_folder, folder, device)
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(clips)
    for part in tqdm(list(batches(clips, batch_seconds)), desc="codes"):
        for index, codes in zip(part, encode(part, clips[part[0]].seconds)):
            found[index] = codes.interleaved
    np.save(folder / "codes.npy", np.concatenate(found).astype(np.int16))
    with atomic_write(folder / "codes_ends.npy") as temporary:
        np.save(temporary, np.cumsum([len(codes) for codes in found]))
    return Codes.open(folder)
