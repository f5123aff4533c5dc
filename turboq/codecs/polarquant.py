"""PolarQuant: recursive polar coordinates after a rotation, angles on optimal grids. Data-free.

Not the community's "PolarQuant" (norm + rotated scalar codes): this is the paper's transform.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import linalg

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers import codebook as codebooks
from turboq.numbers import scale as scales

MAX_LEVELS = 6


@functools.lru_cache(maxsize=64)
def angle_codebook(level: int, bits: int) -> np.ndarray:
    """Optimal angles [2**bits], float64, ascending, of one level of the transform.

    level 1: uniform on [0, 2 pi), so cell centres. level l >= 2: Lloyd-Max for the density
    proportional to sin(2 psi)^(2^(l-1) - 1) on [0, pi/2], the angle of two independent norms of
    2^(l-1) Gaussian coordinates. Cells are integrated by Gauss-Legendre quadrature.

    Raises:
      ValueError: level not in 1..6 or bits not in 1..8.
    """
    checks.check_bits(bits)
    if type(level) is not int or not 1 <= level <= MAX_LEVELS:
        raise ValueError(f"{level=} must be 1..{MAX_LEVELS}")
    count = 2**bits
    if level == 1:
        angles = (np.arange(count) + 0.5) * (2 * np.pi / count)
    else:
        angles = _fixed_point(2 ** (level - 1) - 1, count)
    angles.setflags(write=False)
    return angles


def _fixed_point(power: int, count: int) -> np.ndarray:
    """Angles that are the centroids c of their cells under sin(2 psi)^power on [0, pi/2].

    Newton's method on c(a) - a, whose derivative is tridiagonal: a handful of steps at any count,
    where moving angles to centroids takes count^2. Begins with the density's cube root (Panter and
    Dite 1951), the limit of many angles.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    fine = (np.arange(1 << 14) + 0.5) * (np.pi / 2 / (1 << 14))
    spread = np.cumsum(np.sin(2 * fine) ** (power / 3))
    angles = np.interp((np.arange(count) + 0.5) / count, spread / spread[-1], fine)
    step = np.inf
    for _ in range(100):
        edges = np.concatenate([[0.0], (angles[1:] + angles[:-1]) / 2, [np.pi / 2]])
        half = np.diff(edges)[:, None] / 2
        t = edges[:-1, None] + half * (1 + nodes[None, :])
        each = weights[None, :] * half * np.sin(2 * t) ** power
        mass = np.sum(each, 1)
        moved = np.sum(each * t, 1) / mass
        step = np.max(np.abs(moved - angles))
        if step < 1e-14:
            break
        density = np.sin(2 * edges) ** power
        # Half of d c / d edge: an edge is the mean of two angles. The outer edges stay.
        left = density[:-1] * (moved - edges[:-1]) / mass / 2
        right = density[1:] * (edges[1:] - moved) / mass / 2
        left[0] = right[-1] = 0.0
        bands = np.stack([np.r_[0.0, right[:-1]], left + right - 1, np.r_[left[1:], 0.0]])
        newton = angles - linalg.solve_banded((1, 1), bands, moved - angles)
        inside = np.all(np.diff(np.r_[0.0, newton, np.pi / 2]) > 0)
        angles = newton if inside else moved
    if step > 1e-12:
        raise RuntimeError(f"angles of {power=}, {count=}: last step {step}")
    return angles


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolarQuant(TransformedCodec):
    """Runs of 2^levels rotated coordinates as one radius and 2^levels - 1 quantized angles.

        level 1: (y_1, y_2) -> theta = atan2(y_2, y_1), r = |y|   on pairs of coordinates
        level l: (r_1, r_2) -> psi = atan(r_2 / r_1), r = |r|     on pairs of level l-1 radii

    With the paper's 4 levels at 4, 2, 2, 2 bits and a 16-bit radius per 16 coordinates, 3.875 bits
    per channel at every D (64, 128, 256): (16 + 8*4 + 4*2 + 2*2 + 2) / 16. A run keeps its radius,
    so its error is 2 - 2 prod_l E[cos(angle error)]. Dynamic. No kernel reads it directly.

    `levels` 1..6 with 2^levels dividing dim, `first_bits` of level 1, `bits` of the others.

    Source: PolarQuant, arXiv 2502.02617, Definition 1, Lemma 2 and section 4.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "polarquant"
    source: ClassVar[str] = "arXiv 2502.02617"

    levels: int = 4
    first_bits: int = 4
    bits: int = 2
    rotation: str = "hadamard"
    scale_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        levels = self.levels
        if type(levels) is not int or not 1 <= levels <= MAX_LEVELS or self.dim % 2**levels:
            raise ValueError(
                f"{self.levels=} must be 1..{MAX_LEVELS} with 2**levels dividing {self.dim=}"
            )
        for bits in (self.first_bits, self.bits):
            checks.check_bits(bits)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)

    def bits_of(self, level: int) -> int:
        """Bits of one angle of a level."""
        return self.first_bits if level == 1 else self.bits

    @property
    def fields(self) -> tuple[Field, ...]:
        bits = checks.DTYPE_BITS[self.scale_dtype]
        return (
            *(
                Field(name=f"angles{i}", width=self.dim >> i, bits=self.bits_of(i), dtype="codes")
                for i in range(1, self.levels + 1)
            ),
            Field(name="radius", width=self.dim >> self.levels, bits=bits, dtype=self.scale_dtype),
        )

    @property
    def tables(self) -> dict[str, np.ndarray]:
        levels = range(1, self.levels + 1)
        angles = {f"angles{i}": angle_codebook(i, self.bits_of(i)) for i in levels}
        return super().tables | {k: v.astype(np.float32) for k, v in angles.items()}

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        r, rms = scales.unit_rms(y)
        r = jnp.where(r == 0, 0.0, r)  # atan2 sees the sign of -0.0
        stored = {}
        for level in range(1, self.levels + 1):
            a, b = r[..., ::2], r[..., 1::2]
            find = _first_code if level == 1 else functools.partial(_code, level)
            stored[f"angles{level}"] = find(self.bits_of(level), a, b)
            r = jnp.sqrt(a * a + b * b)
        return stored | {"radius": (r * rms[..., None]).astype(self.scale_dtype)}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        r = stored["radius"].astype(jnp.float32)
        for level in range(self.levels, 0, -1):
            angles, codes = angle_codebook(level, self.bits_of(level)), stored[f"angles{level}"]
            pair = [
                r * codebooks.lookup(jnp.asarray(f(angles), jnp.float32), codes)
                for f in (np.cos, np.sin)
            ]
            r = jnp.stack(pair, axis=-1).reshape(*r.shape[:-1], -1)
        return r


def _first_code(bits: int, a: Float[Array, "*n"], b: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Cell of the angle of (a, b) among 2**bits equal ones from 0 to 2 pi."""
    turns = jnp.arctan2(b, a) * (2**bits / (2 * np.pi))
    return (jnp.floor(turns).astype(jnp.int32) & (2**bits - 1)).astype(jnp.uint8)


def _code(
    level: int, bits: int, a: Float[Array, "*n"], b: Float[Array, "*n"]
) -> UInt8[Array, "*n"]:
    """Nearest angle to atan(b / a) for a, b >= 0: b / a against the tangents of the thresholds."""
    code = jnp.zeros(a.shape, jnp.uint8)
    for edge in codebooks.thresholds(angle_codebook(level, bits)):
        code += (b * np.cos(edge) > a * np.sin(edge)).astype(jnp.uint8)
    return codebooks.materialized(code)
