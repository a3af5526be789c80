"""The release's layout: which folders and files each of the three checkpoints has, and where they lie.

Knows names only and opens nothing; `stepaudio.check` looks into the files.
Source: formats.md sections 1 and 8.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tokenizer.errors import CheckpointError, RequestError
from tokenizer.linguistic import ASR_DIR as ASR_DIR
from tokenizer.linguistic import CENTROIDS_FILE as CENTROIDS_FILE

TOKENIZER_DIR = "Step-Audio-Tokenizer"
CHAT_DIR = "Step-Audio-Chat"
TTS_DIR = "Step-Audio-TTS-3B"
FLOW_DIR = "CosyVoice-300M-25Hz"  # in TTS_DIR
MUSIC_DIR = "CosyVoice-300M-25Hz-Music"  # in TTS_DIR, for RAP and humming
SPEAKERS_DIR = "speakers"  # in TTS_DIR; the release ships its voices apart from the weights
SPEAKERS_FILE = "speakers_info.json"

CHECKPOINTS = {"tokenizer": TOKENIZER_DIR, "tts": TTS_DIR, "chat": CHAT_DIR}
ROOT_VARIABLE = "STEPAUDIO_MODEL_PATH"
BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints" / "nano"


def find_root(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the checkpoints: `path` if given, else `default_root()`.

    Raises CheckpointError if it is no folder or holds none of the three.
    """
    if path is None:
        return default_root()
    return _checked(Path(path), "--model-path")


def default_root() -> Path:
    """`$STEPAUDIO_MODEL_PATH` if it is set, else the small trained checkpoint beside the packages.

    Raises CheckpointError that says how to get one.
    """
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        return _checked(Path(named), f"${ROOT_VARIABLE}")
    if BUNDLED.is_dir():
        return BUNDLED
    raise CheckpointError(
        f"no checkpoint: give --model-path, or set {ROOT_VARIABLE} to the folder that holds {TOKENIZER_DIR} and the "
        "others\n(scripts/make_checkpoint.py --preset tiny --out DIR makes one with random weights)"
    )


def _checked(root: Path, source: str) -> Path:
    if not root.is_dir():
        raise CheckpointError(f"{source}: {root} is not a folder")
    if not any((root / folder).is_dir() for folder in CHECKPOINTS.values()):
        hint = f": give its parent, {root.parent}" if root.name in CHECKPOINTS.values() else ""
        raise CheckpointError(f"{source}: {root} holds none of {', '.join(CHECKPOINTS.values())}{hint}")
    return root


def check_names(names: Collection[str]) -> None:
    """Raises RequestError unless every name is one of "tokenizer", "tts", "chat", and there is one."""
    unknown = [name for name in names if name not in CHECKPOINTS]
    if unknown or not names:
        found = f"checkpoint {unknown[0]!r} is unknown" if unknown else "no checkpoint is named"
        raise RequestError(f"{found}: use {', '.join(CHECKPOINTS)}")


def require_checkpoint(root: Path, name: str) -> Path:
    """The folder of "tokenizer", "tts" or "chat" below `root`; CheckpointError if it is not there."""
    return require_folder(root / CHECKPOINTS[name], name)


def require_folder(folder: Path, name: str) -> Path:
    """`folder`, where the checkpoint `name` should be; CheckpointError if it is not there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: download {CHECKPOINTS[name]} there or check --model-path")
    return folder
