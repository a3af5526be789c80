"""Checkpoints with random weights in the release's full layout: for tests, benchmarks and dry runs.

Every file that a loader opens is there and has the release's form; nothing in them was trained.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stepaudio.checkpoints import ASR_DIR, CHECKPOINTS, FLOW_DIR, MUSIC_DIR, check_names
from stepaudio.export.decoder_files import write_decoder
from stepaudio.export.lm_files import write_lm_config, write_shards
from stepaudio.export.tokenizer_files import write_linguistic, write_semantic
from stepaudio.export.vocabulary import build_vocabulary, write_vocabulary
from stepaudio.lm.geometry import Geometry
from stepaudio.make_checkpoint import random_weights
from stepaudio.make_checkpoint.presets import PRESETS, Preset
from stepaudio.make_checkpoint.voices import VOICES, synthesize, write_voices
from tokenizer.audio import TOKENIZER_RATE, resample
from tokenizer.errors import RequestError
from tokenizer.files import make_folder

_SYMBOLS = ("<blank>", "<s>", "</s>", *"的一是不了人我在有他", "<unk>")
_BF16 = 2  # bytes


def make_checkpoint(
    out: str | os.PathLike[str],
    preset: str = "tiny",
    seed: int = 0,
    only: Collection[str] = tuple(CHECKPOINTS),
    progress: bool = False,
) -> Path:
    """Makes the checkpoints named in `only` ("tokenizer", "tts", "chat") below `out` and returns it.

    `out` appears when all is done, or not at all. "full" needs 1.2 GB of disk for the tokenizer, 8.1 GB for
    tts, 264 GB for chat. Raises RequestError for an unknown name, or if `out` exists and is not empty.
    """
    out = Path(out)
    _check(out, preset, only)
    if not 0 <= seed < 2**31:
        raise RequestError(f"seed {seed} is outside 0..{2**31 - 1}")
    parent = make_folder(out.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    try:
        temporary.chmod(0o755)
        _fill(temporary, PRESETS[preset](), seed, only, progress)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _check(out: Path, preset: str, only: Collection[str]) -> None:
    if preset not in PRESETS:
        raise RequestError(f"preset {preset!r} is unknown: use {' or '.join(PRESETS)}")
    check_names(only)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists and is not an empty folder: give a new name, or remove it first")


def _fill(root: Path, preset: Preset, seed: int, only: Collection[str], progress: bool) -> None:
    clips = [resample(synthesize(voice, seed), TOKENIZER_RATE).samples for voice in VOICES]
    makers: dict[str, Callable[[Path, Callable[[int], None]], None]] = {
        "tokenizer": partial(_tokenizer, preset=preset, clips=clips, seed=seed),
        "tts": partial(_tts, preset=preset, clips=clips, seed=seed),
        "chat": partial(_language_model, preset=preset, geometry=preset.chat, speaks=False, seed=seed + 1),
    }
    weights = {"tts": preset.tts, "chat": preset.chat}
    total = sum(geometry.parameters * _BF16 for name, geometry in weights.items() if name in only)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not (progress and total)) as bar:
        for name, make in makers.items():
            if name in only:
                folder = root / CHECKPOINTS[name]
                folder.mkdir()
                bar.set_description(name)
                make(folder, bar.update)


def _tokenizer(
    folder: Path, written: Callable[[int], None], preset: Preset, clips: list[np.ndarray], seed: int
) -> None:
    encoder, codebook = random_weights.linguistic(preset.linguistic, clips, seed)
    others = random_weights.other_tensors(preset.linguistic, len(_SYMBOLS), seed)
    write_linguistic(
        folder,
        ASR_DIR,
        preset.linguistic,
        encoder.state_dict(),
        random_weights.cmvn(),
        codebook,
        others,
        _SYMBOLS,
    )
    del encoder
    semantic = random_weights.semantic(preset.semantic, clips, seed)
    write_semantic(folder, semantic.state_dict(), preset.semantic.num_heads)


def _tts(folder: Path, written: Callable[[int], None], preset: Preset, clips: list[np.ndarray], seed: int) -> None:
    speaker = random_weights.speaker_encoder(preset.speaker, clips, seed)
    vocoder = random_weights.vocoder(preset.decoder.hift, seed).state_dict()
    for number, name in enumerate((FLOW_DIR, MUSIC_DIR)):
        decoder = folder / name
        decoder.mkdir()
        flow = random_weights.flow(preset.decoder.flow, seed + number).state_dict()
        write_decoder(decoder, preset.decoder, flow, vocoder, speaker)
    write_voices(folder, seed)
    _language_model(folder, written, preset, preset.tts, speaks=True, seed=seed)


def _language_model(
    folder: Path, written: Callable[[int], None], preset: Preset, geometry: Geometry, speaks: bool, seed: int
) -> None:
    vocabulary = build_vocabulary(preset.text(), preset.num_audio, preset.audio_base)
    assert len(vocabulary.pieces) == geometry.vocab_size, (len(vocabulary.pieces), geometry.vocab_size)
    write_vocabulary(folder, vocabulary, chat=not speaks)
    write_lm_config(folder, geometry)
    blocks = random_weights.language_model(geometry, random_weights.leaning(vocabulary, speaks), seed)
    write_shards(folder, geometry.weight_shapes(), blocks, shard_bytes=preset.shard_bytes, written=written)
