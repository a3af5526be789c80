"""Sound to the rows the linguistic encoder reads: Kaldi fbank, frame stacking, mean and scale.

`kaldi_fbank` also serves the speaker encoder. `FrontEnd` is a stream whose state is a value; the
whole clip is the stream fed once. Knows nothing about models or codes.

Legend: N samples at 16 kHz, F frames of 10 ms, T rows of 60 ms, 80 mel bins, 560 = 7 frames x 80.
Source: formats.md sections 5.3 to 5.5.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.audio import TOKENIZER_RATE
from tokenizer.errors import CheckpointError
from tokenizer.files import atomic_write, require_file

NUM_MELS = 80
FRAME_LENGTH, FRAME_SHIFT = 400, 160  # samples: 25 ms every 10 ms
STACK, STACK_SHIFT = 7, 6  # frames in a row, and from one row to the next
ROW_SIZE = NUM_MELS * STACK
CHUNK_ROWS = 4
CHUNK_SAMPLES = CHUNK_ROWS * STACK_SHIFT * FRAME_SHIFT  # 3840: sound is taken in whole chunks of 240 ms

_FFT = 512
_PREEMPHASIS = 0.97
_LOW_HZ, _HIGH_HZ = 20.0, 8000.0
_FLOOR = torch.finfo(torch.float32).eps
_FRAMES_AT_ONCE = 2048  # bounds the memory for long clips to about 30 MB
_OVERLAP = 2 * FRAME_SHIFT  # samples of a chunk whose frames begin in it and end in the next


def kaldi_fbank(
    samples: Tensor, *, window: str = "hamming", dither: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Log mel energies, float32 [N] -> [F, 80] with F = (N - 400) // 160 + 1, or 0 below 400 samples.

    `samples` are taken as scaled by the caller (Kaldi's own scale is that of int16). `window` is
    "hamming" or "povey". `dither` is the deviation of Gaussian noise added to every frame; it is
    drawn frame by frame from the CPU `generator`, so that a signal framed piece by piece gets the
    same noise. Agrees with torchaudio.compliance.kaldi.fbank at 16 kHz and 80 bins (formats.md 5.5).
    """
    assert samples.ndim == 1, samples.shape
    assert not dither or generator is not None, "dither needs a generator"
    if len(samples) < FRAME_LENGTH:
        return samples.new_zeros(0, NUM_MELS)
    frames = samples.unfold(0, FRAME_LENGTH, FRAME_SHIFT)
    return torch.cat([_log_mel(part, window, dither, generator) for part in frames.split(_FRAMES_AT_ONCE)])


def _log_mel(frames: Tensor, window: str, dither: float, generator: torch.Generator | None) -> Tensor:
    """[F, 400] -> [F, 80]."""
    if dither:
        # 400 is a multiple of 16: one draw gives the numbers of a draw per frame
        frames = frames + dither * torch.randn(len(frames), FRAME_LENGTH, generator=generator).to(frames.device)
    return frame_energies(frames, window)


def frame_energies(frames: Tensor, window: str = "hamming") -> Tensor:
    """Log mel energies of frames [.., 400] with their dither -> [.., 80], on any device."""
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - _PREEMPHASIS * before) * _window(window, frames.device)
    power = torch.fft.rfft(frames, n=_FFT).abs().square()
    return (power @ _mel_bank(frames.device)).clamp(min=_FLOOR).log()


@lru_cache(maxsize=8)
def _window(name: str, device: torch.device) -> Tensor:
    """Symmetric window, [400]."""
    if name == "povey":
        return torch.hann_window(FRAME_LENGTH, periodic=False).pow(0.85).to(device)
    assert name == "hamming", f"unknown window {name!r}"
    return torch.hamming_window(FRAME_LENGTH, periodic=False).to(device)


@lru_cache(maxsize=4)
def _mel_bank(device: torch.device) -> Tensor:
    """Triangles whose slopes are straight in mel, [257 FFT bins, 80]; the Nyquist bin has no weight.

    In fp32 throughout and in torchaudio's order of operations, whose rounding shows in quiet bins.
    """
    low, high = 1127.0 * math.log(1 + _LOW_HZ / 700), 1127.0 * math.log(1 + _HIGH_HZ / 700)
    edges = low + torch.arange(NUM_MELS + 2) * ((high - low) / (NUM_MELS + 1))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    mel = 1127.0 * (1 + TOKENIZER_RATE / _FFT * torch.arange(_FFT // 2)[:, None] / 700).log()
    triangles = torch.minimum((mel - left) / (center - left), (right - mel) / (right - center)).clamp(min=0)
    return F.pad(triangles, (0, 0, 0, 1)).to(device)


@dataclass(frozen=True, eq=False)
class Cmvn:
    """Normalisation of a row: y = (x + shift) * scale, both float32 [560]."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Cmvn:
        """Reads Kaldi-nnet text (`am.mvn`). Raises CheckpointError for anything else."""
        path = require_file(path, "feature normalisation")
        words = path.read_text(encoding="utf-8", errors="replace").split()
        return cls(_vector(words, "<AddShift>", path), _vector(words, "<Rescale>", path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the text that `from_file` and the public release's own parser read."""
        shift, scale = (" ".join(f"{value:.9g}" for value in vector.tolist()) for vector in (self.shift, self.scale))
        size = f"{len(self.shift)} {len(self.shift)}"
        with atomic_write(path) as temporary:
            temporary.write_text(
                f"<Nnet> \n<Splice> {size} \n[ 0 ]\n<AddShift> {size} \n<LearnRateCoef> 0 [ {shift} ]\n"
                f"<Rescale> {size} \n<LearnRateCoef> 0 [ {scale} ]\n</Nnet> \n",
                encoding="utf-8",
            )


def _vector(words: list[str], section: str, path: Path) -> Tensor:
    """The numbers in brackets that follow `section`."""
    try:
        begin = words.index("[", words.index(section)) + 1
        values = torch.tensor([float(word) for word in words[begin : words.index("]", begin)]])
    except ValueError:
        raise CheckpointError(
            f"{path}: no list of numbers after {section}: download it again (Kaldi-nnet text is expected)"
        ) from None
    if len(values) != ROW_SIZE or not values.isfinite().all():
        raise CheckpointError(f"{path}: {section} must hold {ROW_SIZE} finite numbers, found {len(values)}")
    return values


@dataclass(frozen=True, eq=False)
class FrontEndState:
    """Where a stream stands. Its tensors are never written to, so a copy of the reference is a snapshot."""

    samples: Tensor  # not framed yet, at int16 scale, [n]
    frames: Tensor  # kept for the next row, [0, 80] at the start, then [1, 80]
    dither: float  # deviation of the noise at int16 scale; the release's is 1.0
    generator: torch.Generator  # of that noise


class FrontEnd:
    """16 kHz samples to encoder rows: fbank, 7 frames stacked every 6, normalised."""

    def __init__(self, cmvn: Cmvn) -> None:
        self.cmvn = cmvn

    def start(self, dither: float = 1.0, seed: int = 0) -> FrontEndState:
        """State of a new utterance; its dither is drawn from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        return FrontEndState(torch.zeros(0), torch.zeros(0, NUM_MELS), dither, generator)

    def rows(self, samples: Tensor, dither: float = 1.0, seed: int = 0) -> Tensor:
        """All rows of a clip, float32 [N] in -1..1 -> [T, 560]. T follows formats.md 5.4 and is 0 below 880 samples."""
        return self.push(self.start(dither, seed), samples, final=True)[0]

    def push(self, state: FrontEndState, samples: Tensor, final: bool = False) -> tuple[Tensor, FrontEndState]:
        """Rows that `samples` [N] complete, [T, 560], and the state after them.

        Only whole chunks of 3840 samples are framed, 4 rows each, until the `final` call, which
        takes what is left. Sound that is too short for another row there is lost, as in the release:
        below 4 frames at the start, below 6 later, and always when the length is a multiple of 3840.
        """
        started = len(state.frames) > 0
        samples = torch.cat([state.samples, samples * 32768.0])
        overlap = _OVERLAP if started else 0
        chunks = (len(samples) - overlap) // CHUNK_SAMPLES
        if not final and not chunks:
            return torch.zeros(0, ROW_SIZE), replace(state, samples=samples)
        usable = len(samples) if final else overlap + chunks * CHUNK_SAMPLES
        generator = state.generator.clone_state()
        frames = kaldi_fbank(samples[:usable], dither=state.dither, generator=generator)
        samples = samples[len(frames) * FRAME_SHIFT :].clone()
        frames = torch.cat([state.frames if started else frames[:1].repeat(STACK // 2, 1), frames])
        count = chunks * CHUNK_ROWS
        if final:
            count += _tail_rows(len(frames) - count * STACK_SHIFT)
        kept = frames[count * STACK_SHIFT :].clone()
        return self._stack(frames, count), FrontEndState(samples, kept, state.dither, generator)

    def _stack(self, frames: Tensor, count: int) -> Tensor:
        """[F, 80] -> [count, 560]; the last row is filled up with the last frame."""
        if count == 0:
            return torch.zeros(0, ROW_SIZE)
        needed = (count - 1) * STACK_SHIFT + STACK
        frames = F.pad(frames.T[None], (0, max(0, needed - len(frames))), mode="replicate")[0]
        rows = frames[:, :needed].unfold(1, STACK, STACK_SHIFT).permute(1, 2, 0).reshape(count, ROW_SIZE)
        return (rows + self.cmvn.shift) * self.cmvn.scale


def row_count(samples: int) -> int:
    """Rows of a whole clip of so many samples (formats.md 5.4)."""
    frames = (samples - FRAME_LENGTH) // FRAME_SHIFT + 1 if samples >= FRAME_LENGTH else 0
    if frames == 0:
        return 0
    rows = samples // CHUNK_SAMPLES * CHUNK_ROWS
    return rows + _tail_rows(frames + STACK // 2 - rows * STACK_SHIFT)


def _tail_rows(frames: int) -> int:
    """Rows out of the frames of an unfinished last chunk, kept ones included."""
    return math.ceil((frames - STACK // 2) / STACK_SHIFT) if frames >= STACK else 0
