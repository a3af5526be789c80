"""Looks into a checkpoint's files and says for each whether it is there, whole and of the right shape.

Reads headers, small files and what is mapped into memory; the language models' weights are never loaded.
Each file is judged by the code that would load it. Source: formats.md sections 1 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from cosyvoice.config import CONFIG_NAME, CosyVoiceConfig, read_config
from cosyvoice.flow import TokenToMel
from cosyvoice.hift import HiFTVocoder
from cosyvoice.speaker import SpeakerEncoder
from cosyvoice.weight_norm import fuse_weight_norm
from stepaudio.checkpoints import ASR_DIR, CENTROIDS_FILE, CHECKPOINTS, FLOW_DIR, MUSIC_DIR, SPEAKERS_DIR
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.geometry import read_config as read_lm_config
from stepaudio.lm.shards import INDEX_NAME, read_header, weight_map
from stepaudio.lm.vocab import Vocab
from stepaudio.tts.speakers import Speakers
from tokenizer.codes import LAYOUT
from tokenizer.errors import CheckpointError, StepAudioError
from tokenizer.fbank import Cmvn
from tokenizer.files import LFS_MAGIC
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.onnx_weights import SemanticFile, read_semantic_onnx
from tokenizer.semantic import SemanticConfig, SemanticEncoder
from tokenizer.weights import check_shapes, read_tensors

T = TypeVar("T")


class Status(str, Enum):
    """What was found in place of a file."""

    OK = "ok"
    MISSING = "missing"
    EMPTY = "empty"
    POINTER = "git-lfs pointer"
    DAMAGED = "damaged"  # cut off or not what its name says
    MISMATCH = "wrong shape"  # readable, but not what the config beside it describes


@dataclass(frozen=True)
class Finding:
    """One file: its path below the root, and what is wrong with it."""

    checkpoint: str  # tokenizer, tts or chat
    file: str
    status: Status
    detail: str = ""
    needed: bool = True  # without it, something that is always used does not work

    @property
    def broken(self) -> bool:
        """Whether it must be mended: a file that is optional may be missing, but not damaged."""
        return self.status is not Status.OK and (self.needed or self.status is not Status.MISSING)


def check(root: Path, only: Collection[str] = tuple(CHECKPOINTS)) -> list[Finding]:
    """Findings for the checkpoints named in `only`, one per file; never raises for what lies on disk."""
    looks = {"tokenizer": _check_tokenizer, "tts": _check_tts, "chat": _check_language_model}
    findings: list[Finding] = []
    for name, folder in CHECKPOINTS.items():
        if name in only:
            inspector = _Inspector(root, name)
            if (root / folder).is_dir():
                looks[name](inspector, root / folder)
            else:
                inspector.add(root / folder, Status.MISSING, "the whole folder")
            findings += inspector.findings
    return findings


class _Inspector:
    """Collects the findings of one checkpoint."""

    def __init__(self, root: Path, checkpoint: str) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self.findings: list[Finding] = []

    def add(self, path: Path, status: Status, detail: str = "", needed: bool = True) -> None:
        file = path.relative_to(self.root).as_posix()
        self.findings.append(Finding(self.checkpoint, file, status, detail, needed))

    def file(
        self,
        path: Path,
        read: Callable[[Path], T],
        compare: Callable[[T], str | None] | None = None,
        needed: bool = True,
    ) -> T | None:
        """Opens one file and compares it; its content if all is well. `compare` may return a remark."""
        status = _at_first_sight(path)
        if status is not None:
            self.add(path, status, needed=needed)
            return None
        try:
            content = read(path)
        except StepAudioError as error:
            self.add(path, Status.DAMAGED, self.plain(error), needed)
            return None
        try:
            remark = compare(content) if compare else None
        except StepAudioError as error:
            self.add(path, Status.MISMATCH, self.plain(error), needed)
            return None
        self.add(path, Status.OK, remark or "", needed)
        return content

    def plain(self, error: Exception) -> str:
        """The message without the root that every path in it begins with."""
        return str(error).replace(f"{self.root}/", "")


def _at_first_sight(path: Path) -> Status | None:
    if not path.is_file():
        return Status.MISSING
    with open(path, "rb") as file:
        head = file.read(len(LFS_MAGIC))
    if not head:
        return Status.EMPTY
    return Status.POINTER if head == LFS_MAGIC else None


def _check_tokenizer(inspector: _Inspector, folder: Path) -> None:
    asr = folder / ASR_DIR
    inspector.file(asr / "config.yaml", lambda path: path.read_bytes(), needed=False)
    cmvn = inspector.file(asr / "am.mvn", Cmvn.from_file)
    centroids = inspector.file(folder / CENTROIDS_FILE, _read_array)
    whole = cmvn is not None and centroids is not None
    inspector.file(
        asr / "model.pt",
        lambda path: read_tensors(path, "linguistic tokenizer"),
        lambda tensors: _compare_linguistic(folder, whole),
    )
    inspector.file(folder / "speech_tokenizer_v1.onnx", read_semantic_onnx, _compare_semantic)


def _read_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no .npy file ({error})") from None


def _compare_linguistic(folder: Path, whole: bool) -> str | None:
    """The encoder, its config and its codebook belong together if the tokenizer can be built from them."""
    if not whole:
        return "not compared: a file beside it is missing or damaged"
    config = LinguisticTokenizer.from_dir(folder).encoder.config
    return f"{config.layers} layers of width {config.size}"


def _compare_semantic(file: SemanticFile) -> str:
    try:
        config = SemanticConfig.from_tensors(file.tensors, file.num_heads, file.strides)
    except KeyError as error:
        raise CheckpointError(f"the weight {error} is missing") from None
    check_shapes(_shapes(lambda: SemanticEncoder(config)), file.tensors, "the ONNX file")
    if config.codebook_size > LAYOUT.semantic_size:
        raise CheckpointError(f"{config.codebook_size} codes, at most {LAYOUT.semantic_size} have an id")
    return f"{config.num_layers} layers of width {config.width}, {config.codebook_size} codes"


def _shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make().state_dict().items()}


def _check_tts(inspector: _Inspector, folder: Path) -> None:
    _check_language_model(inspector, folder)
    _check_decoder(inspector, folder / FLOW_DIR)
    if (folder / MUSIC_DIR).is_dir():
        _check_decoder(inspector, folder / MUSIC_DIR)
    else:
        inspector.add(folder / MUSIC_DIR, Status.MISSING, "needed for RAP and humming only", needed=False)
    speakers = folder / SPEAKERS_DIR
    if speakers.is_dir():
        try:
            names = Speakers.from_path(speakers).names
            inspector.add(speakers, Status.OK, ", ".join(names), needed=False)
        except StepAudioError as error:
            inspector.add(speakers, Status.DAMAGED, str(error), needed=False)
    else:
        inspector.add(speakers, Status.MISSING, "voices can also be given with --speaker-json", needed=False)


def _check_decoder(inspector: _Inspector, folder: Path) -> None:
    config = inspector.file(folder / CONFIG_NAME, read_config)
    inspector.file(
        folder / "flow.pt",
        lambda path: read_tensors(path, "flow model"),
        lambda tensors: _compare_module(config, lambda known: TokenToMel(known.flow), tensors),
    )
    inspector.file(
        folder / "hift.pt",
        lambda path: fuse_weight_norm(read_tensors(path, "vocoder"), str(path)),
        lambda tensors: _compare_module(config, lambda known: HiFTVocoder(known.hift), tensors),
    )
    inspector.file(
        folder / "campplus.onnx", SpeakerEncoder.from_file, lambda encoder: _compare_speaker(config, encoder)
    )


def _compare_module(
    config: CosyVoiceConfig | None,
    make: Callable[[CosyVoiceConfig], nn.Module],
    tensors: Mapping[str, torch.Tensor],
) -> str | None:
    if config is None:
        return f"not compared: {CONFIG_NAME} is missing or damaged"
    check_shapes(_shapes(lambda: make(config)), tensors, CONFIG_NAME)
    return None


def _compare_speaker(config: CosyVoiceConfig | None, encoder: SpeakerEncoder) -> str | None:
    known = config is not None and isinstance(encoder.size, int)  # the file may leave its width open
    if known and encoder.size != config.flow.spk_embed_dim:
        raise CheckpointError(f"embeddings of {encoder.size}, {CONFIG_NAME} asks for {config.flow.spk_embed_dim}")
    return None


def _check_language_model(inspector: _Inspector, folder: Path) -> None:
    geometry = inspector.file(
        folder / "config.json", lambda path: Geometry.from_config(read_lm_config(path.parent)), _describe
    )
    inspector.file(folder / "tokenizer.model", Vocab.from_file, lambda vocab: _compare_vocab(geometry, vocab))
    inspector.file(folder / "tokenizer_config.json", lambda path: path.read_bytes(), needed=False)
    _check_shards(inspector, folder, geometry)


def _describe(geometry: Geometry) -> str:
    return f"{geometry.num_hidden_layers} layers of width {geometry.hidden_size}, {geometry.parameters:,} parameters"


def _compare_vocab(geometry: Geometry | None, vocab: Vocab) -> str:
    if geometry is not None and vocab.size > geometry.vocab_size:
        raise CheckpointError(f"{vocab.size} pieces, the model of config.json knows {geometry.vocab_size}")
    return f"{vocab.size} pieces, <audio_0> = {vocab.audio_base}"


def _check_shards(inspector: _Inspector, folder: Path, geometry: Geometry | None) -> None:
    """The index (or, without one, all *.safetensors), then each shard's header, then all shapes together."""
    try:
        files = weight_map(folder)
    except StepAudioError as error:
        inspector.add(folder / INDEX_NAME, Status.MISSING, inspector.plain(error))
        _check_headers(inspector, sorted(folder.glob("*.safetensors")))
        return
    headers = _check_headers(inspector, sorted(set(files.values())))
    if geometry is None or None in headers.values():
        return
    indexed = {name: headers[path].get(name) for name, path in files.items()}
    lost = sorted(name for name, shape in indexed.items() if shape is None)
    try:
        if lost:
            raise CheckpointError(f"{lost[0]} is not in {files[lost[0]].name}, where the index places it")
        found = {name: torch.empty(shape, device="meta") for name, shape in indexed.items()}
        check_shapes(geometry.weight_shapes(), found, "weights")
    except CheckpointError as error:
        inspector.add(folder / INDEX_NAME, Status.MISMATCH, str(error))
    else:
        remark = "" if (folder / INDEX_NAME).is_file() else ", found without an index"
        inspector.add(folder / INDEX_NAME, Status.OK, f"{len(found)} tensors in {len(headers)} files{remark}")


def _check_headers(inspector: _Inspector, shards: list[Path]) -> dict[Path, dict[str, tuple[int, ...]] | None]:
    return {path: inspector.file(path, read_header) for path in shards}
