"""FP8 weights with scales of blocks, as DeepSeek-V3 and others are published.

    w[i, j] = code[i, j] * scale[i // rows, j // columns]      code e4m3, scale float32

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2. Engines also round activations to FP8; here
they stay float32.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import OTHER_WEIGHTS

METHOD, TYPE = "fp8", "F8_E4M3"
Block = tuple[int, int]


def block_of(settings: Any, where: object) -> Block | None:
    """The block of a `quantization_config`, None where its weights are not in FP8.

    Raises:
      TurboqError: a format or scales of another kind.
    """
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return None
    if settings.get("fmt", "e4m3") != "e4m3":
        raise TurboqError(f"{where}: fmt={quoted(settings['fmt'])} is not supported: e4m3 is")
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise TurboqError(
            f"{where}: weight_block_size={quoted(size)}: FP8 weights are read with one scale for "
            f"each block of rows and columns alone (as [128, 128]): {OTHER_WEIGHTS}"
        )
    return size[0], size[1]


def scales_name(name: str) -> str:
    """The tensor that holds the scales of another."""
    return f"{name}_scale_inv"


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Its shape."""
    return tuple(math.ceil(n / size) for n, size in zip(shape, block, strict=True))


def codes(path: Path, name: str) -> Float[np.ndarray, "R C"]:
    """A tensor of FP8 numbers, which safetensors itself does not hand to NumPy.

    The file has been opened before: its header is known to be sound. It is 8 bytes of its own
    length, then JSON; offsets count from its end.
    """
    begin, header = _header(path, path.stat().st_mtime_ns)
    entry = header[name]
    start, stop = entry["data_offsets"]
    with open(path, "rb") as f:
        f.seek(begin + start)
        raw = np.frombuffer(f.read(stop - start), ml_dtypes.float8_e4m3fn)
    return raw.reshape(entry["shape"])


@functools.lru_cache(maxsize=4)  # a layer's tensors lie in few files, of long headers
def _header(path: Path, changed: int) -> tuple[int, dict[str, Any]]:
    """Where the data of a file begin, and what it says of its tensors."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return 8 + length, json.loads(f.read(length))


def scaled(
    codes: Float[np.ndarray, "R C"], scales: Float[np.ndarray, "r c"], block: Block
) -> Float[np.ndarray, "R C"]:
    """Float32 weights."""
    rows, columns = codes.shape
    wide = np.repeat(scales.astype(np.float32), block[1], axis=1)[:, :columns]
    out = codes.astype(np.float32)
    for i, row in enumerate(wide):  # no second matrix of that size
        out[i * block[0] : min((i + 1) * block[0], rows)] *= row
    return out
