"""A `transform` whose turns are made elsewhere: it codes the first C coordinates as they come."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Stored
from turboq.codecs.transform import Transform

BASES = ("mean", "analysis", "synthesis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates(Transform):
    """x_hat = [gain * c(x[:C] / gain), 0]: `Transform` without a mean, A = [1 0] and S = A^T.

    Not registered: in memory units of joined heads are such (`turboq.cache.composed`), in plans
    they are transforms. Arrays of one head: those of `Transform` but mean, analysis and synthesis.

    Source: as `Transform`.
    """

    name: ClassVar[str] = "coordinates"

    @classmethod
    def of(cls, codec: Transform) -> Coordinates:
        """What codes the coordinates of `codec`, in the same fields."""
        names = [field.name for field in dataclasses.fields(Transform)]
        return cls(**{name: getattr(codec, name) for name in names})

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: n for name, n in super().array_shapes.items() if name not in BASES}

    def mean_of(self, arrays: Arrays) -> Float[Array, "D"]:
        return jnp.zeros((self.dim,), jnp.float32)

    def analysis_of(self, arrays: Arrays) -> Float[Array, "C D"]:
        return jnp.eye(self.coded, self.dim, dtype=jnp.float32)

    def synthesis_of(self, arrays: Arrays) -> Float[Array, "D C"]:
        return jnp.eye(self.dim, self.coded, dtype=jnp.float32)

    # Products with 1 left out.
    def analyse(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n C"]:
        return x[..., : self.coded].astype(jnp.float32)

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values, gain = self.values(arrays, stored), self.gain_of(arrays, stored)
        values = values if gain is None else values * gain[..., None]
        rest = jnp.zeros((*values.shape[:-1], self.dim - self.coded), jnp.float32)
        return jnp.concatenate([values, rest], axis=-1)
