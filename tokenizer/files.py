"""Files on disk: writing that never leaves half a file, and checks before a model file is opened.

Knows nothing about what the files hold.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.errors import CheckpointError, RequestError

LFS_MAGIC = b"version https://git-lfs"


def config_file(name: str) -> Path:
    """A file of `configs/`, which lies beside the packages in a clone and when installed."""
    path = Path(__file__).resolve().parent.parent / "configs" / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: reinstall the package")
    return path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed and renamed into place.

    On any error nothing is left behind and a file already at `path` keeps its content.
    The temporary name keeps the suffix, because writers choose a format by it.
    Raises RequestError if the folder is missing or cannot be written to.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    """A new empty file beside `path` with the same suffix."""
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give the name of a file to write")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}-", suffix=path.suffix, dir=path.parent)
    except FileNotFoundError:
        raise RequestError(f"folder {path.parent} does not exist: create it first") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RequestError(f"cannot write to {path.parent}: {error.strerror}") from None
    os.close(handle)
    return Path(name)


def check_target(path: str | os.PathLike[str], suffixes: Collection[str] = ()) -> Path:
    """Checks that a file can be written at `path`, before long work is done for it.

    Raises RequestError for a folder, a missing or read-only parent, and a suffix not among `suffixes` (if any).
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise RequestError(f"{path}: unknown format {path.suffix!r}: use {', '.join(suffixes)}")
    _temporary_beside(path).unlink()
    return path


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates an output folder (and its parents) and checks that it can be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot create the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise RequestError(f"the folder {path} cannot be written to: choose another or change its rights")
    return path


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Returns `path` if it is a real, non-empty file, else a CheckpointError that says what it is."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{what}: {path} is missing: download it again or check --model-path")
    if not path.is_file():
        raise CheckpointError(f"{what}: {path} is not a file")
    with open(path, "rb") as file:
        head = file.read(len(LFS_MAGIC))
    if not head:
        raise CheckpointError(f"{what}: {path} is empty: download it again")
    if head == LFS_MAGIC:
        raise CheckpointError(f"{what}: {path} is a git-lfs pointer, not the file: run `git lfs pull` in its folder")
    return path
