"""Hadamard rotation whose signs and order of channels are chosen per head from data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.observed import Observed
from turboq.codecs.per_head import inverse
from turboq.codecs.reading import Part, Reading
from turboq.codecs.scalar import dot, lead
from turboq.codecs.writing import Run, WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import rotation as rotations
from turboq.numbers import scale as scales

SCALES = ("vector", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HadamardPerHead(Codec):
    """x_hat = mean + scale R^T c,  R = H diag(signs) P,  c the Gaussian Lloyd-Max point.

    H is `numbers.rotation.hadamard_matrix`; P puts channel order[j] at place j; signs [D] are +-1.
    A random choice of both is TurboQuant with a mean; here a search over many chooses
    (`turboq.codecs.fit_hadamard`).

    `scale`: "vector" stores a root mean square under `scale_rule` in `scale_dtype` (bits + 16/D
    bits per channel: bits + 0.25, 0.125, 0.0625 at D = 64, 128, 256); "head" uses the fitted array
    `scale` for all vectors and stores none (exactly `bits`), needs `scale_rule="raw"` and cannot
    show NaN in what it stores. Static rotation. A kernel reads it as table lookups (`reading`).

    Arrays of one head, float32: mean [D]; signs [D], +-1; order [D], a permutation of 0..D-1; for
    scale="head" scale [] (units of x).

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "hadamard_per_head"
    source: ClassVar[str] = "TurboQuant (arXiv 2504.19874) with chosen Hadamard signs and order"
    needs: ClassVar[tuple[str, ...]] = ("moments", "sample")

    bits: int
    scale: str = "vector"
    scale_rule: str = "raw"
    scale_dtype: str = "float16"

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_bits(self.bits)
        checks.check_choice("scale", self.scale, SCALES)
        checks.check_choice("scale_rule", self.scale_rule, scales.RULES)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)
        if self.scale == "head" and self.scale_rule != "raw":
            raise ValueError(
                f"{self.scale_rule=} must be 'raw' with scale='head' (none per vector)"
            )

    @property
    def fields(self) -> tuple[Field, ...]:
        fields = (Field(name="codes", width=self.dim, bits=self.bits, dtype="codes"),)
        if self.scale == "head":
            return fields
        bits = checks.DTYPE_BITS[self.scale_dtype]
        return (*fields, Field(name="scale", width=1, bits=bits, dtype=self.scale_dtype))

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        row = (self.dim,)
        shapes: dict[str, tuple[int, ...]] = {"mean": row, "signs": row, "order": row}
        return shapes | ({"scale": ()} if self.scale == "head" else {})

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        from turboq.codecs.fit_hadamard import fit_observed

        return fit_observed(self, seen)

    @property
    def table(self) -> np.ndarray:
        """Points [2**bits], float64, ascending, for unit variance."""
        return codebooks.lloyd_max("gaussian", self.bits)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        hadamard = rotations.hadamard_matrix(self.dim).astype(np.float32)
        return {"hadamard": hadamard, "codebook": self.table.astype(np.float32)}

    @property
    def reading(self) -> Reading | None:
        scale = "scale" if self.scale == "vector" else None
        part = Part(field="codes", width=self.dim, bits=self.bits, levels="table", scale=scale)
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        """The points, times the head's scale where none is stored."""
        table = jnp.asarray(self.table, jnp.float32)
        return (table if self.scale == "vector" else table * arrays["scale"],)

    @property
    def writing(self) -> Writing | None:
        part = Run(field="codes", width=self.dim, bits=self.bits)
        if self.scale == "head":
            return Writing(parts=(part,))
        return Writing(
            parts=(part,), gain="rms", rule=self.scale_rule, scale="scale", dtype=self.scale_dtype
        )

    def write_tables(self, arrays: Arrays) -> WriteTables:
        turn = self.rotate(arrays, jnp.eye(self.dim, dtype=jnp.float32)).T
        return WriteTables(
            matrix=turn * inverse(arrays["scale"]) if self.scale == "head" else turn,
            mean=arrays["mean"],
            levels=(jnp.asarray(self.table, jnp.float32),),
        )

    def rotate(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """R x, for vectors and queries alike (R is orthogonal)."""
        order = arrays["order"].astype(jnp.int32)
        y = x.at[..., order].get(mode="clip") * lead(arrays["signs"], x.ndim)
        return rotations.fast_transform(y)

    def rotate_back(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """R^T y."""
        x = rotations.fast_transform(y, transpose=True) * lead(arrays["signs"], y.ndim)
        return x.at[..., jnp.argsort(arrays["order"])].get(mode="clip")

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        x = x.astype(jnp.float32) - lead(arrays["mean"], x.ndim)
        table = jnp.asarray(self.table, jnp.float32)
        if self.scale == "head":
            return {
                "codes": codebooks.nearest(table, self.rotate(arrays, x) * inverse(arrays["scale"]))
            }
        unit, rms = scales.unit_rms(x)
        u = self.rotate(arrays, unit)
        codes = codebooks.nearest(table, u)
        scale = scales.vector_scale(self.scale_rule, u, codebooks.lookup(table, codes), rms)
        return {"codes": codes, "scale": scale.astype(self.scale_dtype)[..., None]}

    def scale_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"]:
        """Scale of every stored vector, float32."""
        if self.scale == "vector":
            return stored["scale"][..., 0].astype(jnp.float32)
        return jnp.broadcast_to(arrays["scale"], stored["codes"].shape[:-1])

    def values(self, stored: Stored) -> Float[Array, "*n D"]:
        """Points of the codes: rotated space, unit scale."""
        return codebooks.lookup(jnp.asarray(self.table, jnp.float32), stored["codes"])

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        # Rotated before scaled, so that scales near the largest float32 do not overflow in R.
        unit = self.rotate_back(arrays, self.values(stored))
        x = unit * self.scale_of(arrays, stored)[..., None]
        return x + lead(arrays["mean"], x.ndim)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        q = q.astype(jnp.float32)
        return {"q": self.rotate(arrays, q), "offset": dot(q, arrays["mean"][:, None])[:, 0]}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        scores = dot(folded["q"], self.values(stored).T) * self.scale_of(arrays, stored)[None, :]
        return scores + folded["offset"][:, None]

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights * self.scale_of(arrays, stored)[None, :], self.values(stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        return self.rotate_back(arrays, acc) + mass[:, None] * arrays["mean"][None, :]
