"""Bytes of the weights from a count of parameters and a storage type: about, unless files are seen.

GGUF types mix block formats by tensor, so bits per weight depend a little on the model. These are
file sizes of Llama-3-8B over its 8.03 billion parameters; other models differ by a few per cent
(large vocabularies more), so give the size of your file (--weights_gib) where it matters.
"""

from __future__ import annotations

import difflib

from turboq.errors import TurboqError
from turboq.what_fits.layers import CacheGeometry

BITS: dict[str, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4,
    "q8_0": 8.51, "q6_k": 6.57, "q5_k_m": 5.71, "q5_k_s": 5.58, "q4_k_m": 4.90, "q4_k_s": 4.67,
    "q3_k_l": 4.31, "q3_k_m": 4.00, "q3_k_s": 3.65, "q2_k": 3.17,
}  # fmt: skip


def weights_bytes(geometry: CacheGeometry, kind: str) -> int:
    """Bytes of a model's weights stored as `kind`; "auto" is the size of the files that were read.

    Raises:
      TurboqError: unknown type, or a model whose parameters (or files) are not known.
    """
    if kind.lower() == "auto":
        if geometry.weights_bytes is None:
            raise TurboqError(
                f"--weights=auto needs the weight files of {geometry.name}: "
                f"{geometry.weights_from}; name a type such as --weights=Q4_K_M, or give "
                "--weights_gib"
            )
        return geometry.weights_bytes
    if kind.lower() == "mxfp4":
        return _mxfp4(geometry)
    bits = BITS.get(kind.lower().replace("-", "_"))
    if bits is None:
        near = difflib.get_close_matches(kind.lower(), BITS, n=2)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"known: auto, mxfp4, {', '.join(BITS)}"
        )
        raise TurboqError(f"unknown weight type {kind!r} ({hint})")
    if geometry.parameters is None:
        raise TurboqError(
            f"--weights={kind}: how many parameters {geometry.name} has is not known here: "
            "give --weights_gib"
        )
    return round(geometry.parameters * bits / 8)


def _mxfp4(geometry: CacheGeometry) -> int:
    """Experts in blocks of 32 numbers of 4 bits with a scale of 8, all the rest in 16 bits."""
    if geometry.experts is None or geometry.parameters is None:
        raise TurboqError(
            f"--weights=mxfp4: how many of the parameters of {geometry.name} are experts, which "
            "alone are stored so, is not known here: give --weights_gib"
        )
    return geometry.experts * 17 // 32 + 2 * (geometry.parameters - geometry.experts)
