"""TurboQuant_prod: b-1 bits of TurboQuant_mse plus a one-bit sketch of what they miss. Data-free.

Kept as the paper's reference: at equal bits its logit noise is far above TurboQuant_mse's, because
the sketch costs pi/2 (Gaussian) or pi/2 - 1 (orthogonal) times the distortion at b-1 bits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.reading import Part, Reading
from turboq.codecs.scalar import ScalarCodec, dot
from turboq.codecs.writing import Run, WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import scale
from turboq.numbers import sign_sketch as residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurboQuantProd(ScalarCodec):
    """x_hat = R^T (scale c + a gamma S^T z), unbiased in <q, x_hat>; bits + 32/D bits per channel.

    At D = 64, 128, 256: bits + 0.5, 0.25, 0.125. Dynamic: nothing is fitted. Kernels read it
    with two folded queries side by side, one for the codes and one for the signs (`reading`).

    `bits` counts both stages: bits-1 for the codes and one for the signs z; bits=1 is the sketch
    alone (QJL), with no codes and no scale. The residual is taken from what is decoded, rounded
    scale included, and sketched in rotated space (S R is again Gaussian or Haar). gamma is stored
    as |r| / sqrt(D), so it has the range of `scale`. E[<q, x_hat>] = <q, x> over the sketch, with
    variance `turboq.numbers.distortion.sketch_variance`.

    Source: TurboQuant, arXiv 2504.19874, Algorithm 2; QJL, arXiv 2406.03482.
    """

    name: ClassVar[str] = "turboquant_prod"
    source: ClassVar[str] = "arXiv 2504.19874, Algorithm 2"

    sketch: str = "gaussian"
    codebook: str = "sphere"

    def __post_init__(self):
        super().__post_init__()
        checks.check_choice("sketch", self.sketch, residual.KINDS)
        checks.check_choice("codebook", self.codebook, codebooks.SOURCES)

    @property
    def signs_of(self) -> residual.Sketch:
        """The sketch S."""
        return residual.Sketch(kind=self.sketch, dim=self.dim, seed=self.seed)

    @property
    def gain(self) -> float:
        """a sqrt(D): turns the stored gamma and the signs into the estimate."""
        return self.signs_of.constant * self.dim**0.5

    @property
    def fields(self) -> tuple[Field, ...]:
        sketch = (self.codes_field(1, "signs"), self.scalar_field("gamma"))
        if self.bits == 1:
            return sketch
        return (self.codes_field(self.bits - 1), self.scalar_field("scale"), *sketch)

    @property
    def reading(self) -> Reading | None:
        signs = Part(field="signs", width=self.dim, bits=1, levels="sign", scale="gamma")
        if self.bits == 1:
            return Reading(parts=(signs,))
        codes = Part(
            field="codes", width=self.dim, bits=self.bits - 1, levels="table", scale="scale",
            symmetric=True,
        )  # fmt: skip
        return Reading(parts=(codes, signs))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        one = jnp.ones((1,), jnp.float32)
        return (one,) if self.bits == 1 else (self.codebook_of(arrays), one)

    def reading_query(
        self, arrays: Arrays, q: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T C"], Float[Array, "T"] | None]:
        folded = self.fold_query(arrays, q)
        if self.bits == 1:
            return folded["sketch"], None
        return jnp.concatenate([folded["q"], folded["sketch"]], axis=-1), None

    @property
    def writing(self) -> Writing | None:
        run = Run(field="codes", width=self.dim, bits=self.bits - 1)
        return Writing(
            parts=(run,) if self.bits > 1 else (),
            gain="rms", rule=self.scale_rule, scale="scale" if self.bits > 1 else None,
            signs="signs", gamma="gamma", dtype=self.scale_dtype,
        )  # fmt: skip

    def write_tables(self, arrays: Arrays) -> WriteTables:
        return WriteTables(
            matrix=jnp.asarray(self.turn.matrix, jnp.float32),
            mean=jnp.zeros((self.dim,), jnp.float32),
            levels=(self.codebook_of(arrays),) if self.bits > 1 else (),
            sketch=jnp.asarray(self.signs_of.matrix, jnp.float32),
        )

    @property
    def tables(self) -> dict[str, np.ndarray]:
        tables = super().tables | {"sketch": self.signs_of.matrix.astype(np.float32)}
        if self.bits > 1:
            table = codebooks.lloyd_max(self.codebook, self.bits - 1, self.dim)
            tables["codebook"] = table.astype(np.float32)
        return tables

    def codebook_of(self, arrays: Arrays) -> Float[Array, "levels"]:
        return jnp.asarray(
            codebooks.lloyd_max(self.codebook, self.bits - 1, self.dim), dtype=jnp.float32
        )

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        unit, rms = scale.unit_rms(self.centered(arrays, x))
        r = self.turn.apply(unit)
        stored = {}
        if self.bits > 1:
            table = self.codebook_of(arrays)
            codes = codebooks.nearest(table, r)
            c = codebooks.lookup(table, codes)
            kept = scale.vector_scale(self.scale_rule, r, c, rms).astype(self.scale_dtype)
            stored = {"codes": codes, "scale": kept[..., None]}
            # All in units of rms, so that no square overflows.
            factor = kept.astype(jnp.float32) / jnp.where(rms == 0, 1.0, rms)
            r = r - factor[..., None] * c
        signs, norm = self.signs_of.encode(r)
        gamma = (norm * rms * self.dim**-0.5).astype(self.scale_dtype)
        return stored | {"signs": signs, "gamma": gamma[..., None]}

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        gamma = stored["gamma"][..., 0].astype(jnp.float32)
        y = self.signs_of.decode(stored["signs"], gamma * self.dim**0.5)
        if self.bits > 1:
            y = y + self.values(arrays, stored) * self.scale_of(arrays, stored)[..., None]
        return self.turn.invert(y)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        rotated = self.turn.apply(q)
        return {"q": rotated, "sketch": self.signs_of.apply(rotated) * self.gain}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        gamma = stored["gamma"][:, 0].astype(jnp.float32)
        scores = dot(folded["sketch"], residual.plus_minus(stored["signs"]).T) * gamma[None, :]
        return scores + super().logits(arrays, folded, stored) if self.bits > 1 else scores

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        """[T, 2D]: sum of codes, then sum of signs ([T, D] at one bit, which has no codes)."""
        gamma = stored["gamma"][:, 0].astype(jnp.float32)
        signs = dot(weights * gamma[None, :], residual.plus_minus(stored["signs"]))
        if self.bits == 1:
            return signs
        return jnp.concatenate([super().accumulate(arrays, weights, stored), signs], axis=-1)

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        codes, signs = acc[:, : -self.dim], acc[:, -self.dim :]
        y = dot(signs, jnp.asarray(self.signs_of.matrix, dtype=jnp.float32)) * self.gain
        return self.turn.invert(y + codes if self.bits > 1 else y)
