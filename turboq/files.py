"""Whole files or nothing: write under a temporary name, flush, then rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from turboq.errors import TurboqError


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to `path` so that readers see the old file or the new one, never a part.

    Raises:
      TurboqError: the folder does not exist, is a file, is not writable, or the disk is full.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise TurboqError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates an output folder, or says why it cannot be one."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise TurboqError(f"output folder {path} is a file: choose another --out") from None
    except OSError as error:
        raise TurboqError(f"cannot create output folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise TurboqError(f"output folder {path} is not writable")
    return path


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, streamed."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
