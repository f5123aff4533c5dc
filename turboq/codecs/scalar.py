"""What codecs with a rotation and a scalar codebook share: everything but where arrays come from.

    y = R (x - mean),  u = y / scale,  code = nearest(codebook, u),  x_hat = mean + scale R^T c

Codes live in rotated space, so R is applied once to the query and once to the output, and the mean
becomes one number per query (K) or one vector per output (V).
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.reading import Part, Reading
from turboq.codecs.writing import Run, WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import rotation as rotations
from turboq.numbers import scale as scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalarCodec(Codec):
    """Rotation + scalar codebook + one stored scale per vector.

    `bits` are stored bits per coordinate; `scale_rule` is one of `turboq.numbers.scale.RULES`;
    `scale_dtype` holds the scale, a root-mean-square (norm / sqrt(D)) in units of x.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    bits: int
    rotation: str = "hadamard"
    seed: int = 0
    scale_rule: str = "raw"
    scale_dtype: str = "float16"

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_bits(self.bits)
        checks.check_choice("rotation", self.rotation, rotations.KINDS)
        rotations.check_dim_and_seed(self.dim, self.seed)
        checks.check_choice("scale_rule", self.scale_rule, scales.RULES)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)

    @property
    def turn(self) -> rotations.Rotation:
        """The rotation R."""
        return rotations.Rotation(kind=self.rotation, dim=self.dim, seed=self.seed)

    @abc.abstractmethod
    def codebook_of(self, arrays: Arrays) -> Float[Array, "levels"]:
        """Codebook of one head, float32, unit-variance scale."""

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return {"rotation": self.turn.matrix.astype(np.float32)}

    @property
    def fields(self) -> tuple[Field, ...]:
        return (self.codes_field(self.bits), self.scalar_field("scale"))

    @property
    def reading(self) -> Reading | None:
        part = Part(
            field="codes", width=self.dim, bits=self.bits, levels="table", scale="scale",
            symmetric="codebook" not in self.array_shapes,  # a fitted one need not be
        )  # fmt: skip
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        return (self.codebook_of(arrays),)

    @property
    def writing(self) -> Writing | None:
        run = Run(field="codes", width=self.dim, bits=self.bits)
        return Writing(
            parts=(run,), gain="rms", rule=self.scale_rule, scale="scale", dtype=self.scale_dtype
        )

    def write_tables(self, arrays: Arrays) -> WriteTables:
        mean = arrays.get("mean", jnp.zeros((self.dim,), jnp.float32))
        matrix = jnp.asarray(self.turn.matrix, jnp.float32)
        return WriteTables(matrix=matrix, mean=mean, levels=(self.codebook_of(arrays),))

    def codes_field(self, bits: int, name: str = "codes") -> Field:
        return Field(name=name, width=self.dim, bits=bits, dtype="codes")

    def scalar_field(self, name: str) -> Field:
        """One number per vector in `scale_dtype`."""
        bits = checks.DTYPE_BITS[self.scale_dtype]
        return Field(name=name, width=1, bits=bits, dtype=self.scale_dtype)

    def centered(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """x - mean in float32."""
        x = x.astype(jnp.float32)
        return x - lead(arrays["mean"], x.ndim) if "mean" in arrays else x

    def restored(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """x + mean."""
        return x + lead(arrays["mean"], x.ndim) if "mean" in arrays else x

    def scale_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"]:
        """Scale of every stored vector, float32."""
        return stored["scale"][..., 0].astype(jnp.float32)

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        unit, rms = scales.unit_rms(self.centered(arrays, x))
        u = self.turn.apply(unit)
        table = self.codebook_of(arrays)
        codes = codebooks.nearest(table, u)
        scale = scales.vector_scale(self.scale_rule, u, codebooks.lookup(table, codes), rms)
        return {"codes": codes, "scale": scale.astype(self.scale_dtype)[..., None]}

    def values(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        """Codebook values of the codes: rotated space, unit scale."""
        return codebooks.lookup(self.codebook_of(arrays), stored["codes"])

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        # Rotated before scaled, so that scales near the largest float32 do not overflow in R.
        unit = self.turn.invert(self.values(arrays, stored))
        return self.restored(arrays, unit * self.scale_of(arrays, stored)[..., None])

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        q = q.astype(jnp.float32)
        folded = {"q": self.turn.apply(q)}
        if "mean" in arrays:
            folded["offset"] = dot(q, arrays["mean"][:, None])[:, 0]
        return folded

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        scores = dot(folded["q"], self.values(arrays, stored).T)
        scores = scores * self.scale_of(arrays, stored)[None, :]
        return scores + folded["offset"][:, None] if "offset" in folded else scores

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights * self.scale_of(arrays, stored)[None, :], self.values(arrays, stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        out = self.turn.invert(acc)
        if "mean" in arrays:
            out = out + mass[:, None] * arrays["mean"][None, :]
        return out


def dot(a: Float[Array, "M N"], b: Float[Array, "N O"]) -> Float[Array, "M O"]:
    """Matrix product in full float32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def lead(v: Float[Array, "D"], ndim: int) -> Array:
    """v with leading axes of one, for explicit broadcasting."""
    return v.reshape((1,) * (ndim - 1) + (-1,))
