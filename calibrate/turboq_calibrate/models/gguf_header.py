"""The header of a GGUF file: metadata and the tensor table, every length checked against the file.

`gguf.GGUFReader` reads the same, but trusts the lengths (a damaged one can make it loop for ever)
and takes seconds for a vocabulary; types, block sizes and dequantisation are the package's.
Layout (little endian): "GGUF", version, tensor count, metadata count, then key-value pairs, then
(name, axes, type, offset) per tensor, then the data, aligned.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from turboq.errors import TurboqError, quoted, shortened

VERSIONS = (2, 3)
MAX_AXES = 4  # of ggml
STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}

KINDS = {int(kind): kind for kind in gguf.GGMLQuantizationType}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: row-major `shape`, storage `kind`, bytes [start, start + nbytes) of
    the file, which is number `part` of a split model.

    A `kind` that the package does not know stays the file's number; whoever needs the weights
    refuses it.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType | int
    start: int
    nbytes: int
    part: int = 0


class Cursor:
    """Reads forward through the header; a length that leaves the file is one clear error."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, memoryview(data), 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise TurboqError(
                f"{self.path} is truncated or damaged: the header needs {count} bytes at "
                f"{self.at}, the file has {len(self.data)}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, code: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def text(self) -> str:
        raw = bytes(self.take(self.numbers("Q")[0]))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise TurboqError(
                f"{self.path} is damaged: a name is not UTF-8: {quoted(raw)}"
            ) from None

    def value_type(self) -> gguf.GGUFValueType:
        code = self.numbers("I")[0]
        try:
            return gguf.GGUFValueType(code)
        except ValueError:
            raise TurboqError(f"{self.path} is damaged: metadata type {code} is unknown") from None

    def value(self, kind: gguf.GGUFValueType, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if depth > 4:
            raise TurboqError(f"{self.path} is damaged: metadata lists nest too deeply")
        item, count = self.value_type(), self.numbers("Q")[0]
        if item in SCALARS:
            return list(self.numbers(SCALARS[item], count))
        if count * 8 > len(self.data) - self.at:
            self.take(count * 8)  # the shortest strings and lists take 8 bytes each: cannot fit
        if item == STRING:
            return self.texts(count)
        return [self.value(item, depth + 1) for _ in range(count)]

    def texts(self, count: int) -> list[str]:
        """`count` strings; one loop without calls, as vocabularies hold some 100 000."""
        data, at, out = self.data, self.at, []
        length_at, end = struct.Struct("<Q").unpack_from, len(self.data)
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0] if start <= end else end + 1
            if at > end:
                self.take(at - self.at)
            out.append(bytes(data[start:at]))
        self.at = at
        try:
            return [raw.decode("utf-8") for raw in out]
        except UnicodeDecodeError as error:
            raise TurboqError(
                f"{self.path} is damaged: a string is not UTF-8: {shortened(error)}"
            ) from None


def read(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo], np.ndarray]:
    """Metadata as plain values, tensors by name, and the file's bytes, memory-mapped.

    Raises:
      TurboqError: unreadable, not GGUF, an unsupported version, truncated or damaged.
    """
    try:
        if path.stat().st_size == 0:
            raise TurboqError(f"{path} is empty")
        data = np.memmap(path, mode="r")
    except OSError as error:
        raise TurboqError(f"cannot read {path}: {error.strerror or error}") from error
    cursor = Cursor(path, data)
    if bytes(cursor.take(min(4, len(data)))) != b"GGUF":
        raise TurboqError(f"{path} is not a GGUF file")
    version = cursor.numbers("I")[0]
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise TurboqError(
            f"{path} is a big-endian GGUF file, which is not supported: convert it to little "
            "endian (gguf-convert-endian of the gguf package)"
        )
    if version not in VERSIONS:
        raise TurboqError(
            f"{path}: GGUF version {version} is not supported (2 or 3, little endian)"
        )
    tensors, pairs = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise TurboqError(f"{path} is damaged: metadata field {shortened(key)} repeats")
        metadata[key] = cursor.value(cursor.value_type())
    return metadata, _tensor_table(cursor, tensors, metadata), data


def _tensor_table(cursor: Cursor, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    path = cursor.path
    rows = []
    for _ in range(count):
        name = cursor.text()
        axes = cursor.numbers("I")[0]
        if axes > MAX_AXES:
            raise TurboqError(f"{path} is damaged: tensor {shortened(name)} has {axes} axes")
        dims = cursor.numbers("Q", axes)
        rows.append((name, tuple(reversed(dims)), *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise TurboqError(f"{path}: general.alignment={quoted(alignment)} must be a power of two")
    base = -(-cursor.at // alignment) * alignment
    offsets = sorted({offset for *_, offset in rows})
    out: dict[str, TensorInfo] = {}
    for name, shape, code, offset in rows:
        where = f"{path}: tensor {shortened(name)}"
        if name in out:
            raise TurboqError(f"{where} repeats: the file is damaged")
        kind, start = KINDS[code] if code in KINDS else int(code), base + offset
        if isinstance(kind, gguf.GGMLQuantizationType):
            nbytes = _stored_bytes(kind, shape, where)
        else:  # its size is not known: it ends where the next tensor begins
            after = bisect.bisect_right(offsets, offset)
            end = base + offsets[after] if after < len(offsets) else len(cursor.data)
            nbytes = max(end - start, 0)
        if start + nbytes > len(cursor.data):
            raise TurboqError(
                f"{where} needs bytes up to {start + nbytes}, the file has {len(cursor.data)}: it "
                "is truncated"
            )
        out[name] = TensorInfo(name=name, shape=shape, kind=kind, start=start, nbytes=nbytes)
    return out


def _stored_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], where: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise TurboqError(
            f"{where} of type {kind.name} has shape {list(shape)}, whose rows are not whole blocks "
            f"of {block}"
        )
    return math.prod(shape) // block * size
