"""QJL: the signs of a sketch and the norm, one bit per sketch row. Data-free."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.scalar import dot
from turboq.numbers import rotation as rotations
from turboq.numbers import scale as scales
from turboq.numbers import sign_sketch as residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class QJL(Codec):
    """<q, x_hat> = a |x| <S q, sign(S x)> with S [rows, D]: unbiased over S.

    `rows` is a multiple r D: S stacks r independent D x D sketches (seeds seed .. seed + r - 1),
    orthogonal ("orthogonal", as QJL's code orthogonalises its rows: Haar, a = E-constant / r) or
    iid N(0, 1) ("gaussian", the paper's analysis, a = sqrt(pi/2) / rows). Variance of the estimate:
    [(pi/2) |q|^2 |x|^2 - <q, x>^2] / rows (gaussian); for orthogonal S about pi/2 - 1 in place of
    pi/2 (`turboq.numbers.distortion.sketch_variance` / r).

    (rows + 16) / D bits per channel with a 16-bit norm: with rows = 2 D 2.25 (D=64), 2.125 (128),
    2.0625 (256). Dynamic. No kernel reads it directly. The norm is stored as |x| / sqrt(D). QJL's
    own separate sketch of 8 outlier channels is not part of this codec.

    Source: QJL, arXiv 2406.03482, Definitions 3.1 and 3.2.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "qjl"
    source: ClassVar[str] = "arXiv 2406.03482"

    rows: int
    sketch: str = "orthogonal"
    seed: int = 0
    scale_dtype: str = "float16"

    def __post_init__(self):
        checks.check_dim(self.dim)
        rows, most = self.rows, rotations.MAX_DIM
        if type(rows) is not int or not 1 <= rows <= most or rows % self.dim:
            raise ValueError(f"{rows=} must be a multiple of dim={self.dim} up to {most}")
        checks.check_choice("sketch", self.sketch, residual.KINDS)
        rotations.check_dim_and_seed(self.dim, self.seed)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)

    @property
    def sketches(self) -> tuple[residual.Sketch, ...]:
        """The square sketches that S stacks."""
        return tuple(
            residual.Sketch(kind=self.sketch, dim=self.dim, seed=self.seed + i)
            for i in range(self.rows // self.dim)
        )

    @property
    def matrix(self) -> np.ndarray:
        """S [rows, D], float64."""
        return np.concatenate([s.matrix for s in self.sketches])

    @property
    def constant(self) -> float:
        """a: E[a |x| <S q, sign(S x)>] = <q, x>."""
        return self.sketches[0].constant * self.dim / self.rows

    @property
    def gain(self) -> float:
        """a sqrt(D), for the stored |x| / sqrt(D)."""
        return self.constant * self.dim**0.5

    @property
    def fields(self) -> tuple[Field, ...]:
        bits = checks.DTYPE_BITS[self.scale_dtype]
        return (
            Field(name="signs", width=self.rows, bits=1, dtype="codes"),
            Field(name="scale", width=1, bits=bits, dtype=self.scale_dtype),
        )

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return {"sketch": self.matrix.astype(np.float32)}

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        unit, rms = scales.unit_rms(x.astype(jnp.float32))
        signs = (rotations.product(unit, self.matrix.T) >= 0).astype(jnp.uint8)
        return {"signs": signs, "scale": rms.astype(self.scale_dtype)[..., None]}

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        unit = rotations.product(residual.plus_minus(stored["signs"]), self.matrix * self.gain)
        return unit * stored["scale"].astype(jnp.float32)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        return {"q": rotations.product(q.astype(jnp.float32), self.matrix.T * self.gain)}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        scores = dot(folded["q"], residual.plus_minus(stored["signs"]).T)
        return scores * stored["scale"].astype(jnp.float32).T

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        weights = weights * stored["scale"].astype(jnp.float32).T
        return dot(weights, residual.plus_minus(stored["signs"]))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        return rotations.product(acc, self.matrix * self.gain)
