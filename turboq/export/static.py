"""Static ranges that a plan's fitted arrays give, for engines that load calibrated scales.

    FP8, NVFP4    range = scale * largest number                  one per head
    PerChannel    range = max(|lowest|, |highest|) level          one per channel

Codecs that scale every token on its own, or code a rotated vector, give none.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from turboq.codecs.fp8 import FP8
from turboq.codecs.minifloat import E4M3
from turboq.codecs.nvfp4 import NVFP4
from turboq.codecs.per_channel import PerChannel, rope_pairs
from turboq.errors import TurboqError
from turboq.export.base import Entry, Held


def peaks(entry: Entry) -> np.ndarray | None:
    """Largest |x| [D] per channel that does not saturate, float64; None if the plan knows none.

    Of a plan that stores keys before RoPE, the ranges that those keys cannot leave after it.
    """
    peak = _peaks(entry)
    return peak if peak is None or entry.rope == "after" else _norms(entry, peak)


def _peaks(entry: Entry) -> np.ndarray | None:
    codec, arrays = entry.codec, entry.arrays
    if isinstance(codec, FP8 | NVFP4) and "scale" in arrays:
        return np.full(codec.dim, float(arrays["scale"]) * codec.range)
    if isinstance(codec, PerChannel) and codec.rotation == "identity":
        scale = arrays["channel_scale"].astype(np.float64)
        if codec.form == "symmetric":
            return scale * 2 ** (codec.bits - 1)
        low = arrays["channel_zero"].astype(np.float64)
        return np.maximum(np.abs(low), np.abs(low + scale * (2**codec.bits - 1)))
    return None


def rope_envelope(entry: Entry, peak: np.ndarray) -> np.ndarray:
    """Ranges that no position can leave: sqrt(a_d^2 + a_pair^2) for both channels of a rotary pair.

    An upper bound of the pair norms that were seen; values and channels without RoPE keep theirs.
    """
    if entry.side == "v" or entry.rope != "after":  # `peaks` has done it
        return peak
    return _norms(entry, peak)


def _norms(entry: Entry, peak: np.ndarray) -> np.ndarray:
    pairs = rope_pairs(entry.layer.rope_layout, _rope_dim(entry), entry.dim)
    out = peak.copy()
    out[pairs] = np.hypot(peak[pairs[:, 0]], peak[pairs[:, 1]])[:, None]
    return out


def has_envelope(entry: Entry) -> bool:
    """Whether both channels of every rotary pair already have one range (values: always)."""
    peak = peaks(entry)
    if entry.side == "v" or peak is None:
        return True
    pairs = rope_pairs(entry.layer.rope_layout, _rope_dim(entry), entry.dim)
    return bool(np.allclose(peak[pairs[:, 0]], peak[pairs[:, 1]], rtol=1e-5, atol=0))


def _rope_dim(entry: Entry) -> int:
    return entry.dim if entry.layer.rope_dim is None else entry.layer.rope_dim


def static_fp8(entry: Entry) -> Held | None:
    """One head in e4m3 with a static scale, exact if the plan has it so; None without a range.

    Raises:
      TurboqError: a scale of zero, which engines divide by.
    """
    codec = entry.codec
    static = isinstance(codec, FP8) and codec.format == "e4m3" and codec.scale != "token"
    if static and entry.rope == "after":
        if "scale" in entry.arrays and not entry.arrays["scale"] > 0:
            raise TurboqError(f"{entry}: scale is 0 and would be divided by: fit the plan again")
        return Held(format="fp8_e4m3", codec=codec, arrays=entry.arrays)
    peak = peaks(entry)
    if peak is None:
        return None
    return with_scale(entry, float(peak.max()) / E4M3.largest)


def with_scale(entry: Entry, scale: float) -> Held:
    """One head in e4m3 with a given scale."""
    value = np.float32(max(scale, float(np.finfo(np.float32).tiny)))
    codec = FP8(dim=entry.dim, format="e4m3", scale="head")
    return Held(format="fp8_e4m3", codec=codec, arrays={"scale": np.asarray(value)})


def scale_of(held: Held) -> float:
    """The static scale of a head held in FP8 or NVFP4; 1 where it has none."""
    return float(held.arrays["scale"]) if "scale" in held.arrays else 1.0


def shared_scale(helds: list[Held]) -> list[Held]:
    """The same heads under one scale, the largest, as engines with one per tensor need it."""
    values = [scale_of(held) for held in helds]
    if len(set(values)) == 1:
        return helds
    largest = np.asarray(np.float32(max(values)))
    out = []
    for held, value in zip(helds, values, strict=True):
        if value == float(largest):
            out.append(held)
            continue
        codec = held.codec
        if isinstance(codec, FP8):
            codec = dataclasses.replace(codec, scale="head")
        note = f"scale {value:.6g} -> {float(largest):.6g}, the largest of those that share one"
        out.append(dataclasses.replace(held, codec=codec, arrays={"scale": largest}, note=note))
    return out
