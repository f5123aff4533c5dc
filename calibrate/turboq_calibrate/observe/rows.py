"""Rows of float32 on disk, written part by part: hidden states, their gradients, sampled tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from turboq.errors import TurboqError, shortened


class RowsFile:
    """A float32 .npy file [N, ...]; plain reads and writes, because a full disk under a memory map
    kills the process where a write raises."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.shape = path, shape
        self._row = int(np.prod(shape[1:])) * 4

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self._row

    def create(self) -> None:
        """Reserves the whole file, so that a full disk shows now and not hours later.

        Raises:
          TurboqError: no space or no permission.
        """
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as f:
                np.lib.format.write_array_header_1_0(
                    f, {"descr": "<f4", "fortran_order": False, "shape": self.shape}
                )
                f.flush()
                _reserve(f, self.nbytes)
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise TurboqError(
                f"cannot reserve {self.nbytes:,} bytes for {self.path}: {error.strerror}"
            ) from error

    def write(self, start: int, x: Float[np.ndarray, "B *n"]) -> None:
        """Rows start, start+1, ...; on disk on return, so that a checkpoint may rely on it."""
        data = np.ascontiguousarray(x, dtype="<f4")
        try:
            with open(self.path, "r+b") as f:
                f.seek(self._offset(f) + start * self._row)
                f.write(data)
                f.flush()
                os.fdatasync(f.fileno())
        except OSError as error:
            raise TurboqError(f"cannot write {self.path}: {error.strerror}") from error

    def read(self, start: int, stop: int) -> Float[np.ndarray, "B *n"]:
        """Rows [start, stop).

        Raises:
          TurboqError: the file is missing, cut short, or of another shape.
        """
        try:
            with open(self.path, "rb") as f:
                f.seek(self._offset(f) + start * self._row)
                x = np.fromfile(f, dtype="<f4", count=(stop - start) * self._row // 4)
        except OSError as error:
            raise TurboqError(f"cannot read {self.path}: {error.strerror}") from error
        if x.size != (stop - start) * self._row // 4:
            raise TurboqError(f"{self.path} is cut short: remove the folder to start again")
        return x.reshape(stop - start, *self.shape[1:])

    def _offset(self, f) -> int:
        try:
            np.lib.format.read_magic(f)
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        except ValueError as error:
            raise TurboqError(
                f"{self.path} is damaged ({shortened(error)}): remove the folder"
            ) from error
        if shape != self.shape or dtype != np.dtype("<f4"):
            raise TurboqError(f"{self.path} is {dtype}{shape}, expected float32{self.shape}")
        return f.tell()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _reserve(file: BinaryIO, nbytes: int) -> None:
    """Takes disk space from the current position on: a sparse file would fail hours later."""
    if not nbytes:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, file.tell() + nbytes)
        return
    piece = bytes(2**20)  # macOS has no posix_fallocate
    for start in range(0, nbytes, len(piece)):
        file.write(piece[: nbytes - start])
    file.flush()
