"""The linguistic tokenizer: 16 kHz sound -> codes 0..1023, 16.67 per second, whole or as it arrives.

Sound -> rows (`fbank.FrontEnd`) -> vectors (`sanm.SanmEncoder`) -> nearest k-means centroid. There is one
way through: a clip is a stream fed once and closed, a batch is streams that begin together. Sound
is taken in chunks of 240 ms and a chunk sees nothing after itself, so codes do not depend on how
the sound is cut or on batch neighbours, to the rounding of fp32.

Knows nothing of the semantic codes or of language.
Legend: N samples, T rows and codes, D width. Source: formats.md section 5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenizer.codes import LAYOUT
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.fbank import CHUNK_ROWS, CHUNK_SAMPLES, ROW_SIZE, Cmvn, FrontEnd, FrontEndState
from tokenizer.files import require_file
from tokenizer.graphs import check_engine
from tokenizer.linguistic_batch import MAX_CHUNKS, LinguisticBatch
from tokenizer.sanm import SanmConfig, SanmEncoder, SanmState
from tokenizer.split import split
from tokenizer.weights import build, read_tensors

ASR_DIR = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
CENTROIDS_FILE = "linguistic_tokenizer.npy"
_WHAT = "linguistic tokenizer"
_PREFIX = "encoder."
# What the code implements, by the names of config.yaml; the sizes are compared with the tensors.
IMPLEMENTED = {
    "encoder_conf": {
        "input_layer": "pe_online",
        "normalize_before": True,
        "sanm_shfit": 0,
        "selfattention_layer_type": "sanm",
    },
    "frontend_conf": {
        "fs": 16000,
        "window": "hamming",
        "n_mels": 80,
        "frame_length": 25,
        "frame_shift": 10,
        "lfr_m": 7,
        "lfr_n": 6,
    },
}


@dataclass(frozen=True, eq=False)
class LinguisticState:
    """Where a stream stands, as a value: keep the reference to come back to it."""

    front_end: FrontEndState
    encoder: SanmState


class LinguisticTokenizer:
    """Front end, encoder and codebook. Features and codebook search run in fp32 on the CPU, as in the release.

    `block_chunks` chunks of 240 ms are encoded at once, over all clips of a batch; at release
    size 64 of them take about 60 MB, and more are no faster on a CPU. On a CUDA device `engine` "auto" takes whole
    clips through `LinguisticBatch`; "plain" leaves them to the code here.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        encoder: SanmEncoder,
        centroids: Tensor,
        block_chunks: int = 64,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        assert centroids.shape == (LAYOUT.linguistic_size, encoder.config.size), centroids.shape
        self.front_end = front_end
        self.encoder = encoder
        self.centroids = centroids.cpu().float()
        self.block_chunks = block_chunks
        self.device = encoder.after_norm.weight.device
        fast = engine == "auto" and self.device.type == "cuda"
        self.batch = LinguisticBatch(front_end.cmvn, split(encoder), self.centroids) if fast else None

    @classmethod
    def from_dir(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu", engine: str = "auto"
    ) -> LinguisticTokenizer:
        """From `Step-Audio-Tokenizer` as released. Raises CheckpointError naming the file and what is wrong."""
        folder = Path(folder)
        asr = folder / ASR_DIR
        return cls.from_files(
            asr / "model.pt", asr / "am.mvn", folder / CENTROIDS_FILE, asr / "config.yaml", device=device, engine=engine
        )

    @classmethod
    def from_files(
        cls,
        weights: str | os.PathLike[str],
        cmvn: str | os.PathLike[str],
        centroids: str | os.PathLike[str],
        config: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        engine: str = "auto",
    ) -> LinguisticTokenizer:
        """From single files. Sizes come from the tensors; config.yaml is optional, and checked where it exists."""
        encoder = _read_encoder(Path(weights), Path(config)).to(device)
        codebook = _read_centroids(Path(centroids), encoder.config.size)
        return cls(FrontEnd(Cmvn.from_file(cmvn)), encoder, codebook, engine=engine)

    def encode(
        self, clips: Sequence[np.ndarray], dither: float = 1.0, seeds: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Codes of 16 kHz clips, each float32 [N] in -1..1 -> int64 [T], as one padded batch.

        `dither` is the deviation of the noise that the release adds, in int16 steps; each clip draws
        its own from its seed (0 where none are given). N below 880 samples gives no codes.
        """
        seeds = [0] * len(clips) if seeds is None else seeds
        assert len(seeds) == len(clips), (len(seeds), len(clips))
        sounds = [_samples(clip) for clip in clips]
        if self.batch is not None and all(len(sound) <= MAX_CHUNKS * CHUNK_SAMPLES for sound in sounds):
            return self.batch.encode(sounds, dither, seeds)
        rows = [self.front_end.rows(sound, dither, seed) for sound, seed in zip(sounds, seeds)]
        order = sorted((i for i in range(len(rows)) if len(rows[i])), key=lambda i: len(rows[i]))
        codes = [np.zeros(0, np.int64) for _ in clips]
        for begin in range(0, len(order), self.block_chunks):
            part = order[begin : begin + self.block_chunks]
            for i, found in zip(part, self._encode_rows([rows[i] for i in part])):
                codes[i] = found
        return codes

    def stream(self, dither: float = 1.0, seed: int = 0) -> LinguisticStream:
        """A new stream; any number can be open at a time."""
        return LinguisticStream(self, LinguisticState(self.front_end.start(dither, seed), self.encoder.start(1)))

    def _encode_rows(self, rows: list[Tensor]) -> list[np.ndarray]:
        """Non-empty clips in order of length; the finished ones leave the batch after each block."""
        codes: list[list[np.ndarray]] = [[] for _ in rows]
        state, begin, active = self.encoder.start(len(rows)), 0, list(range(len(rows)))
        while active:
            end = begin + CHUNK_ROWS * max(1, self.block_chunks // len(active))
            found, state = self.encode_block([rows[i][begin:end] for i in active], state)
            for i, block in zip(active, found):
                codes[i].append(block)
            going_on = [j for j, i in enumerate(active) if len(rows[i]) > end]
            if len(going_on) < len(active):
                state = state.select(going_on)
            begin, active = end, [active[j] for j in going_on]
        return [np.concatenate(blocks) for blocks in codes]

    @torch.inference_mode()
    def encode_block(self, rows: list[Tensor], state: SanmState) -> tuple[list[np.ndarray], SanmState]:
        """The next rows of each clip, [T_i, 560], through the encoder at once -> their codes, and the state."""
        counts = [len(piece) for piece in rows]
        padded = pad_sequence(rows, batch_first=True).to(self.device)
        vectors, state = self.encoder.step(padded, torch.tensor(counts, device=self.device), state)
        vectors = torch.cat([clip[:count] for clip, count in zip(vectors, counts)]).cpu()
        codes = torch.cdist(vectors, self.centroids).argmin(dim=1)  # the first of equals
        return [piece.numpy() for piece in codes.split(counts)], state


class LinguisticStream:
    """Sound in pieces of any length -> codes as soon as their 240 ms are complete.

    `state` may be read, kept and set again to roll back; it is None once the stream is closed.
    """

    def __init__(self, tokenizer: LinguisticTokenizer, state: LinguisticState) -> None:
        self._tokenizer = tokenizer
        self.state: LinguisticState | None = state

    def push(self, samples: np.ndarray) -> np.ndarray:
        """More sound, float32 [N] at 16 kHz in -1..1 -> the codes it completes, int64 [T], often none."""
        return self._push(samples, final=False)

    def close(self) -> np.ndarray:
        """The codes of the unfinished last chunk, int64 [0..4]."""
        codes = self._push(np.zeros(0, np.float32), final=True)
        self.state = None
        return codes

    def _push(self, samples: np.ndarray, final: bool) -> np.ndarray:
        if self.state is None:
            raise RequestError("this stream is closed: open a new one, or set its state to an earlier one")
        engine, encoder = self._tokenizer, self.state.encoder
        rows, front_end = engine.front_end.push(self.state.front_end, _samples(samples), final)
        codes = [np.zeros(0, np.int64)]
        for block in rows.split(CHUNK_ROWS * engine.block_chunks) if len(rows) else ():
            found, encoder = engine.encode_block([block], encoder)
            codes += found
        self.state = LinguisticState(front_end, encoder)
        return np.concatenate(codes)


def _samples(samples: np.ndarray) -> Tensor:
    samples = np.asarray(samples)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise RequestError(f"16 kHz sound must be float [samples] in -1..1, not {samples.dtype} {samples.shape}")
    if not np.isfinite(samples).all():
        raise RequestError("sound holds NaN or infinite samples: repair it first")
    return torch.from_numpy(np.array(samples, np.float32))  # a copy: the caller's array may be read-only


def _read_encoder(weights: Path, config: Path) -> SanmEncoder:
    """The `encoder.*` tensors of model.pt, strictly; the decoder and predictor beside them are not used."""
    tensors = read_tensors(weights, _WHAT)
    tensors = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
    settings = _read_config(config)
    sizes = _sizes(tensors, settings.get("encoder_conf", {}).get("attention_heads", SanmConfig.heads), weights, config)
    _check_config(settings, sizes, config)
    return build(lambda: SanmEncoder(sizes), tensors, str(weights)).float()


def _sizes(tensors: Mapping[str, Tensor], heads: Any, source: Path, config: Path) -> SanmConfig:
    """The encoder's sizes as its tensors show them; the number of heads does not show."""
    first = "encoders0.0."
    names = ("norm1.weight", "norm2.weight", "feed_forward.w_1.weight", "self_attn.fsmn_block.weight")
    missing = [name for name in names if first + name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: {_PREFIX}{first}{missing[0]} is missing: this is no SANM encoder checkpoint")
    input_size, size, feed_forward = (tensors[first + name].shape[0] for name in names[:3])
    kernel = tensors[first + names[3]].shape[-1]
    if kernel % 2 == 0 or input_size != ROW_SIZE:
        raise CheckpointError(
            f"{source}: kernel {kernel}, input {input_size}; implemented are odd kernels and an input of {ROW_SIZE}"
        )
    if not isinstance(heads, int) or heads < 1 or size % heads:
        raise CheckpointError(
            f"{config}: encoder_conf.attention_heads must be a number that divides the width {size} of the weights, "
            f"not {heads!r} (it is {SanmConfig.heads} where the file does not say)"
        )
    layers = {name.split(".")[1] for name in tensors if name.startswith("encoders.")}
    return SanmConfig(size, heads, feed_forward, 1 + len(layers), kernel, input_size)


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml as data; empty if there is none."""
    if not path.exists():
        return {}
    try:
        settings = yaml.safe_load(require_file(path, _WHAT).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid YAML ({str(error).splitlines()[0]}): download it again") from None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in IMPLEMENTED):
        raise CheckpointError(f"{path} must hold named settings with {' and '.join(IMPLEMENTED)}: download it again")
    return settings


def _check_config(settings: Mapping[str, Any], sizes: SanmConfig, path: Path) -> None:
    """Every number the file names must be the one of the tensors or of this code."""
    found_sizes = {
        "output_size": sizes.size,
        "linear_units": sizes.feed_forward,
        "num_blocks": sizes.layers,
        "kernel_size": sizes.kernel,
    }
    for section, fixed in IMPLEMENTED.items():
        expected = {**fixed, **(found_sizes if section == "encoder_conf" else {})}
        for name, value in settings.get(section, {}).items():
            if name in expected and value != expected[name]:
                source = "the weights have" if name in found_sizes else "implemented is"
                raise CheckpointError(f"{path}: {section}.{name} is {value!r}, {source} {expected[name]!r}")


def _read_centroids(path: Path, width: int) -> Tensor:
    """The k-means codebook, float32 [1024, D]."""
    try:
        centroids = np.load(require_file(path, "linguistic codebook"), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"linguistic codebook: {path} is damaged or no .npy file ({error})") from None
    expected = (LAYOUT.linguistic_size, width)
    if not isinstance(centroids, np.ndarray) or centroids.shape != expected:
        shape = getattr(centroids, "shape", None)
        raise CheckpointError(f"linguistic codebook: {path} has shape {shape}, the encoder asks for {expected}")
    if not np.issubdtype(centroids.dtype, np.floating) or not np.isfinite(centroids).all():
        raise CheckpointError(f"linguistic codebook: {path} must hold finite floats, found {centroids.dtype}")
    return torch.from_numpy(np.ascontiguousarray(centroids, np.float32))
