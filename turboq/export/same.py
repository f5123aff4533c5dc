"""When two codecs store the same values although they are described differently."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from turboq.codecs.base import Codec
from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.ggml import Ggml
from turboq.codecs.int_affine import IntAffine
from turboq.codecs.kivi import KiviValue
from turboq.codecs.transformed import TransformedCodec


@functools.lru_cache(maxsize=4096)
def canonical(codec: Codec) -> dict[str, Any]:
    """A config that equal codecs share: unused seeds and blocks, and names of one thing, are one.

    FP8 with one scale for all heads is FP8 with a scale per head whose arrays are equal; ggml's f16
    is an exact float16; KIVI's values are plain affine integers without a rotation.
    """
    if isinstance(codec, Ggml) and codec.type == "f16" and codec.rotation == "identity":
        codec = Exact(dim=codec.dim, dtype="float16")
    if isinstance(codec, FP8) and codec.scale == "tensor":
        codec = dataclasses.replace(codec, scale="head")
    config = codec.config()
    if isinstance(codec, TransformedCodec) and "rotation" in config:
        if codec.rotation in ("identity", "walsh"):
            config["seed"] = 0
        if codec.rotation == "identity" or codec.rotation_block == codec.dim:
            config["rotation_block"] = 0
    if isinstance(codec, IntAffine | KiviValue):
        config["codec"] = "affine"
        if codec.group == codec.dim:
            config["group"] = 0
    return config


def same(
    a: Codec, a_arrays: Mapping[str, np.ndarray], b: Codec, b_arrays: Mapping[str, np.ndarray]
) -> bool:
    """Whether two codecs with their arrays of one head store the same values."""
    if canonical(a) != canonical(b):
        return False
    # Units of joined heads have only some of their codec's arrays.
    names = a_arrays.keys() & a.array_shapes.keys()
    return names == b_arrays.keys() & b.array_shapes.keys() and all(
        np.array_equal(a_arrays[name], b_arrays[name]) for name in names
    )


def differences(a: Codec, b: Codec) -> list[str]:
    """`field plan -> engine` of every field in which two codecs of one family differ."""
    x, y = canonical(a), canonical(b)
    if x["codec"] != y["codec"]:
        return []
    return [f"{key} {x[key]} -> {y[key]}" for key in x if x[key] != y.get(key)]
