"""The type of stored scales, where the user left it open: wide enough for what was observed.

float16 ends at 65504, and a scale beyond it is stored as infinity. bfloat16 reaches as far as
float32, with 8 bits of precision instead of 11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from turboq.codecs import Codec
from turboq_calibrate.observe.layer_statistics import LayerStatistics
from turboq_calibrate.observe.statistics import NORM_BINS

LARGEST = float(np.finfo(np.float16).max)


def wide_enough(
    codec: Codec, layers: Iterable[LayerStatistics], side: str, rope: str = "after"
) -> tuple[Codec, str]:
    """The codec with bfloat16 scales if a vector too large for float16 was observed, and a line
    that says so; as it is, and "", if none was or if its scales are not float16."""
    if "scale_dtype" not in codec.config() or codec.config()["scale_dtype"] != "float16":
        return codec, ""
    for index, layer in enumerate(layers):
        found = layer.v if side == "v" else layer.k if rope == "after" else layer.k_before
        # Of the last bin that is not empty, the upper edge: no vector was longer.
        norms = found.norm_quantile(1.0) / (1 - NORM_BINS.relative_error)
        head = int(np.nanargmax(np.append(norms, 0.0)))
        if head < len(norms) and norms[head] > LARGEST:
            return dataclasses.replace(codec, scale_dtype="bfloat16"), (
                f"scales of {side.upper()} are bfloat16: layer {index} has vectors of a norm of up "
                f"to {norms[head]:.3g} in head {head}, float16 ends at {LARGEST:.0f} "
                "(--scale_dtype chooses otherwise)"
            )
    return codec, ""
