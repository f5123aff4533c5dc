"""What a kernel must know to encode: one matrix, one gain per vector, thresholds, maybe a sketch.

Of the codecs with scalar codebooks, what is stored of a vector x is

    y = A (x - mean)                                   A [C, D]: rotation, transform, static scale
    g = rms(y)                                         gain "rms": `turboq.numbers.scale.unit_rms`
    g = gains[#{i: sqrt(gains_i gains_i+1) < rms(y)}]  gain "code"; its index is stored
    g = 1                                              gain "none"
    u = y / g,  code_j = #{i: t_i < u_j}               t_i midway between the levels of j's part
    scale = vector_scale(rule, u, c, g)                gain "rms" with parts; c_j the level of u_j
    r = u - round(scale) / g * c                       with a sketch (r = u without parts)
    sign_j = (S r)_j >= 0,  gamma = |r| g / sqrt(D)

with the parts' coordinates in order, so that C is the sum of their widths (or D without parts) and
round() is to the type in which the scale is stored. This is `Codec.encode` up to the rounding of
sums: `turboq_kernels.encode` compares the two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from turboq.numbers import scale as scales

GAINS = ("none", "rms", "code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of coordinates: the packed field of its codes."""

    field: str
    width: int
    bits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """How a kernel encodes: which numbers go into which stored field.

    `scale` is the raw field of the scale (gain "rms"), or the packed one of `gain_bits` bits and
    width 1 of the gain's index (gain "code"); None with gain "none". `signs` and `gamma` are the
    fields of the sketch, or None. Every raw field has width 1 and the type `dtype`.

    Raises:
      ValueError: an unknown gain or rule, or fields that do not belong together.
    """

    parts: tuple[Run, ...]
    gain: str = "none"
    rule: str = "raw"
    scale: str | None = None
    gain_bits: int = 0
    signs: str | None = None
    gamma: str | None = None
    dtype: str = "float16"

    def __post_init__(self):
        if self.gain not in GAINS:
            raise ValueError(f"{self.gain=} must be one of {GAINS}")
        if self.rule not in scales.RULES:
            raise ValueError(f"{self.rule=} must be one of {scales.RULES}")
        stores_scale = self.gain == "code" or (self.gain == "rms" and bool(self.parts))
        if stores_scale != (self.scale is not None):
            raise ValueError(f"{self.scale=} does not go with {self.gain=} and {self.parts=}")
        if (self.gain == "code") != (self.gain_bits > 0):
            raise ValueError(f"{self.gain_bits=} does not go with {self.gain=}")
        if (self.signs is None) != (self.gamma is None):
            raise ValueError(f"{self.signs=} and {self.gamma=} must both be fields, or None")
        if self.signs is not None and self.gain != "rms":
            raise ValueError(f"{self.gain=} must be 'rms' with a sketch")
        if not self.parts and self.signs is None:
            raise ValueError("a writing needs at least one part, or a sketch")

    @property
    def starts(self) -> tuple[int, ...]:
        """First coordinate of every part."""
        return tuple(sum(p.width for p in self.parts[:i]) for i in range(len(self.parts)))

    @property
    def rows(self) -> tuple[str, ...]:
        """Fields with one number per vector, in order: scale, gamma."""
        return tuple(x for x in (self.scale, self.gamma) if x is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteTables:
    """The arrays of a `Writing`, float32; of N heads with a leading axis of N (`vmap`).

    matrix  [C, D]     A
    mean    [D]
    levels  [2**bits]  of every part, ascending
    gains   [2**gain_bits] ascending and positive, or None
    sketch  [C, C]     S, or None
    """

    matrix: Any
    mean: Any
    levels: tuple[Any, ...]
    gains: Any = None
    sketch: Any = None
