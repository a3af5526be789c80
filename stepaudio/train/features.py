"""Features of a whole corpus, made once, kept as one flat array on the training device.

Kinds: `rows` (stacked fbank [T, 560] at 16.67 Hz), `log_mel` ([T, 128] at 100 Hz), `mel` ([T, 80] at
22,050 / 256 Hz), `f0` (Hz, [T, 1] on the mel's frames, 0 where unvoiced), `wave22` (int16 [N, 1] at 22,050 Hz),
`fbank80` (what the speaker encoder sees, [T, 80] at 100 Hz). Other stages write two more: `codes` (interleaved,
[T, 1] at 41.667 Hz) and `embedding` ([1, 192] per clip). Clips are cut into batches of one length class, so that
a device sees few shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cosyvoice.config import MelConfig
from cosyvoice.mel import mel_spectrogram
from cosyvoice.speaker import speaker_features
from stepaudio.train.data import Clip, Corpus
from stepaudio.train.pitch import pitch
from tokenizer.audio import TOKENIZER_RATE, Audio, normalize_peak, resample
from tokenizer.codes import LAYOUT
from tokenizer.fbank import Cmvn, FrontEnd
from tokenizer.log_mel import log_mel

RATES = {
    **{"rows": 100 / 6, "log_mel": 100.0, "mel": 22050 / 256, "f0": 22050 / 256},
    **{"wave22": 22050.0, "fbank80": 100.0, "codes": LAYOUT.rate},
}  # feature frames per second


def rows_of(samples: np.ndarray, cmvn: Cmvn | None = None) -> np.ndarray:
    """What the linguistic encoder sees, [T, 560]; without `cmvn` before its normalisation."""
    cmvn = cmvn or Cmvn(torch.zeros(560), torch.ones(560))
    return FrontEnd(cmvn).rows(torch.from_numpy(normalize_peak(samples)), 1.0, 0).numpy()


def log_mel_of(samples: np.ndarray) -> np.ndarray:
    """What the semantic encoder sees, [T, 128]."""
    return log_mel(torch.from_numpy(normalize_peak(samples))).T.numpy()


def mel_of(samples: np.ndarray) -> np.ndarray:
    """What the flow model makes, [T, 80] at 22,050 Hz."""
    config = MelConfig()
    sound = resample(Audio(samples, TOKENIZER_RATE), config.sampling_rate)
    return mel_spectrogram(torch.from_numpy(sound.samples), config).numpy()


def wave22_of(samples: np.ndarray) -> np.ndarray:
    """What the vocoder makes, int16 [N, 1] at 22,050 Hz."""
    sound = resample(Audio(samples, TOKENIZER_RATE), MelConfig().sampling_rate).samples
    return np.round(np.clip(sound, -1, 1) * 32767).astype(np.int16)[:, None]


def f0_of(samples: np.ndarray) -> np.ndarray:
    """Fundamental frequency on the frames of `mel`, Hz, [T, 1]."""
    return pitch(samples)[:, None]


def fbank80_of(samples: np.ndarray) -> np.ndarray:
    """What the speaker encoder sees, [T, 80], the clip's mean removed."""
    return speaker_features(torch.from_numpy(samples)).numpy()


MAKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{"rows": rows_of, "log_mel": log_mel_of, "mel": mel_of},
    **{"wave22": wave22_of, "f0": f0_of, "fbank80": fbank80_of},
}
_corpus: Corpus | None = None  # of a worker process


def _open(folder: Path) -> None:
    global _corpus
    torch.set_num_threads(1)
    _corpus = Corpus.open(folder)


def _make(task: tuple[str, int]) -> np.ndarray:
    kind, index = task
    assert _corpus is not None
    made = MAKERS[kind](_corpus.sound(_corpus.clips[index]))
    return made if made.dtype == np.int16 else made.astype(np.float16)


def write_features(folder: Path, kind: str, workers: int) -> None:
    """Makes `<kind>.npy` and `<kind>_ends.npy` in a corpus folder, unless they are there."""
    if (folder / f"{kind}_ends.npy").exists():
        return
    count = len(Corpus.open(folder))
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(folder,)) as pool:
        tasks = [(kind, index) for index in range(count)]
        pieces = list(tqdm(pool.map(_make, tasks, chunksize=16), total=count, desc=kind))
    np.save(folder / f"{kind}.npy", np.concatenate(pieces))
    np.save(folder / f"{kind}_ends.npy", np.cumsum([len(piece) for piece in pieces]))


@dataclass(frozen=True, eq=False)
class Features:
    """One kind of features of every clip of a corpus, flat: `data` [sum T, D] float16 or int16, with ends per clip."""

    data: Tensor
    ends: np.ndarray

    @classmethod
    def open(cls, folder: Path, kind: str, device: torch.device) -> Features:
        data = torch.from_numpy(np.load(folder / f"{kind}.npy")).to(device)
        return cls(data if data.ndim == 2 else data[:, None], np.load(folder / f"{kind}_ends.npy"))

    def length(self, index: int) -> int:
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))

    def spans(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where clips begin in `data`, and how long they are."""
        at = np.asarray(indices)
        begin = np.where(at > 0, self.ends[at - 1], 0)
        return begin, self.ends[at] - begin

    def gather(self, indices: Sequence[int], size: int, starts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """[B, size, D] float32, zero past a clip's end, and lengths [B]; `starts` are offsets into the clips."""
        offset = np.asarray([0] * len(indices) if starts is None else starts)
        begin, length = self.spans(indices)
        device = self.data.device
        position = torch.arange(size, device=device)
        first, count = sent(np.stack([begin + offset, np.minimum(size, length - offset)]), device)
        where = first[:, None] + position.minimum(count[:, None] - 1).clamp(min=0)
        valid = position < count[:, None]
        return self.data[where].float() * valid[..., None], count

    def whole(self, index: int) -> Tensor:
        """All of one clip, [T, D] float32."""
        end = int(self.ends[index])
        return self.data[end - self.length(index) : end].float()

    def repeat(self, indices: Sequence[int], size: int, starts: Sequence[int]) -> Tensor:
        """[B, size, D] float32 from offsets into the clips; a clip that ends begins again."""
        device = self.data.device
        begin, length, start = sent(np.stack([*self.spans(indices), np.asarray(starts)]), device)[..., None]
        return self.data[begin + (start + torch.arange(size, device=device)) % length].float()


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers on the device, without waiting for what it is busy with."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def length_batches(
    clips: Sequence[Clip], seconds_per_batch: float, seed: int, start: int = 0, grid: float = 0.8, longest: float = 16.0
) -> Iterator[tuple[list[int], float]]:
    """Endless (clip indices, padded seconds), a fixed batch size per length class; goes on at batch `start`."""
    classes: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        if clip.seconds <= longest:
            classes.setdefault(int(np.ceil(clip.seconds / grid)), []).append(index)
    done = 0
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        batches: list[tuple[list[int], float]] = []
        for cell, members in classes.items():
            size = max(1, round(seconds_per_batch / (cell * grid)))
            order = rng.permutation(np.resize(members, -(-len(members) // size) * size))
            batches += [(order[i : i + size].tolist(), cell * grid) for i in range(0, len(order), size)]
        for at in rng.permutation(len(batches)):
            if done >= start:
                yield batches[at]
            done += 1
        epoch += 1
