"""Whole files or nothing: write under a temporary name, flush, then rename."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from turboq.errors import TurboqError

_LOG = logging.getLogger("turboq")  # `turboq --verbosity=1` shows it
PARTIAL = ".partial"  # ends the names of files and folders that are not whole yet
COMPLETE = ".complete"  # of files that are whole, on their way to their places (`write_together`)
ABANDONED = (
    3600.0  # seconds after which the writer of a partial file was killed: none takes so long
)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to `path` so that readers see the old file or the new one, never a part.

    Raises:
      TurboqError: the folder does not exist, is a file, is not writable, or the disk is full.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        clear_abandoned(path)
        fd, temporary = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
        with os.fdopen(fd, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if not path.parent.name.endswith(PARTIAL):
            _LOG.debug("wrote %s", path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise TurboqError(f"cannot write {path}: {error.strerror or error}") from error


def clear_abandoned(path: Path) -> None:
    """Removes what writers of `path` left beside it that were killed an hour ago or earlier."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(PARTIAL):
            left = path.parent / name
            with contextlib.suppress(OSError):  # another run cleared it, or may alone do so
                if time.time() - left.lstat().st_mtime > ABANDONED:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_together(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Writes several files of a folder so that after `settle` all are old or all are new.

    They are written to a hidden folder, which is renamed when it is whole: from then on they count,
    and are moved to their places one by one. Killed in between, `settle` moves the others: whoever
    reads or writes these files calls it first.

    Raises:
      TurboqError: as `atomic_write`; the old files stay.
    """
    settle(folder)
    clear_abandoned(folder / COMPLETE)
    try:
        temporary = Path(tempfile.mkdtemp(PARTIAL, f".{COMPLETE}.", folder))
        try:
            for name, data in files.items():
                atomic_write(temporary / name, data)
            while True:
                try:
                    os.replace(temporary, folder / COMPLETE)
                    break
                except OSError:
                    if not (folder / COMPLETE).is_dir():
                        raise
                    settle(folder)  # another writer's, whose turn was first
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise TurboqError(f"cannot write {folder}: {error.strerror or error}") from error
    settle(folder)


def settle(folder: Path) -> None:
    """Finishes a `write_together` that was cut off when its files were whole.

    Raises:
      TurboqError: there is one, and the folder cannot be written.
    """
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    try:
        for name in sorted(os.listdir(complete)):
            with contextlib.suppress(FileNotFoundError):  # another run moved it
                os.replace(complete / name, folder / name)
                _LOG.debug("wrote %s", folder / name)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(complete)
    except OSError as error:
        raise TurboqError(
            f"{folder} holds new results that were cut off on their way to their places, and cannot"
            f" be written ({error.strerror or error}): make it writable, and run this again"
        ) from error


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


def exchange(new: Path, old: Path) -> None:
    """Two folders change names, in one step where the system has one for it (Linux).

    Elsewhere there is a moment without `old`; if the second step fails, the first is undone.
    """
    # From Python 3.12's standard library alone: neither os nor shutil knows this call.
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call is not None and not call(here, os.fsencode(new), here, os.fsencode(old), both):
        return
    aside = new.with_name(f"{new.name}.old{PARTIAL}")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, streamed."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
