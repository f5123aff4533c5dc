"""TurboQuant with outlier channels: two independent instances at different bits.

The paper's "2.5 bits" is 32 channels at 3 bits, 96 at 2 and two 16-bit norms over 128 channels, and
its "3.5 bits" the same with 4 and 3 (the payload alone is 2.25 and 3.25). How the paper chooses the
channels is not stated; here they are those of largest second moment on calibration data.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.observed import Observed
from turboq.codecs.reading import Part, Reading
from turboq.codecs.turboquant_mse import TurboQuantMSE
from turboq.numbers import codebook as codebooks
from turboq.numbers import rotation as rotations
from turboq.numbers import scale as scales

RECIPES = {"2.5": (3, 2), "3.5": (4, 3)}  # bits of outliers and of the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurboQuantOutliers(Codec):
    """`turboquant_mse` at `outlier_bits` on the outlier channels, at `bits` on the others.

    Each part has its own rotation (seeds 2 seed and 2 seed + 1), codebook and stored scale:

        (outliers outlier_bits + (D - outliers) bits + 2 * 16) / D  bits per channel

    At 3 and 2 bits on a quarter of the channels 2.75 (D=64), 2.5 (128), 2.375 (256); at 4 and 3 one
    bit more. `outliers` is their number, a multiple of 8; 0 means a quarter of dim, rounded up to
    one. Calibrated: the array outlier [D] holds a score per channel (1 for outliers, 0 for others
    from `choose_outliers`); the `outliers` highest are taken, lower channels first among equals.
    Dynamic otherwise. Kernels read both parts (`reading`). Error for iid channels: the mean
    of both parts' `turboquant_mse` errors, weighted by their channels.

    Source: TurboQuant, arXiv 2504.19874, section 4.3 (recipes: `RECIPES`).

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "turboquant_outliers"
    source: ClassVar[str] = "arXiv 2504.19874, section 4.3"
    needs: ClassVar[tuple[str, ...]] = ("moments",)

    bits: int
    outlier_bits: int
    outliers: int = 0
    rotation: str = "hadamard"
    seed: int = 0
    scale_rule: str = "raw"
    scale_dtype: str = "float16"
    codebook: str = "sphere"

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_bits(self.bits)
        checks.check_bits(self.outlier_bits)
        checks.check_choice("rotation", self.rotation, rotations.KINDS)
        checks.check_choice("scale_rule", self.scale_rule, scales.RULES)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)
        checks.check_choice("codebook", self.codebook, codebooks.SOURCES)
        if type(self.seed) is not int or not 0 <= self.seed < 2**62:
            raise ValueError(f"{self.seed=} must be an integer from 0 to 2**62 - 1")
        count = self.outliers
        if type(count) is not int or count % 8 or not 0 <= count < self.dim or self.dim < 16:
            raise ValueError(
                f"outliers={count!r} must be a multiple of 8 from 0 (a quarter) to below"
                f" dim={self.dim}, which must be at least 16"
            )

    @property
    def split(self) -> int:
        """Number of outlier channels."""
        return self.outliers or -(-self.dim // 32) * 8

    @property
    def parts(self) -> tuple[TurboQuantMSE, TurboQuantMSE]:
        """The codecs of the outlier channels and of the others."""
        sizes = ((self.split, self.outlier_bits), (self.dim - self.split, self.bits))
        high, low = (
            TurboQuantMSE(
                dim=dim,
                bits=bits,
                rotation=self.rotation,
                seed=2 * self.seed + i,
                scale_rule=self.scale_rule,
                scale_dtype=self.scale_dtype,
                codebook=self.codebook,
            )
            for i, (dim, bits) in enumerate(sizes)
        )
        return high, low

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(
            dataclasses.replace(f, name=f"{which}_{f.name}")
            for which, part in zip(("outlier", "other"), self.parts, strict=True)
            for f in part.fields
        )

    @property
    def reading(self) -> Reading | None:
        return Reading(
            parts=tuple(
                Part(
                    field=f"{which}_codes", width=part.dim, bits=part.bits, levels="table",
                    scale=f"{which}_scale", symmetric=True,
                )
                for which, part in zip(("outlier", "other"), self.parts, strict=True)
            )
        )  # fmt: skip

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        high, low = self.parts
        return high.codebook_of({}), low.codebook_of({})

    def reading_query(
        self, arrays: Arrays, q: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T C"], Float[Array, "T"] | None]:
        folded = self.fold_query(arrays, q)
        return jnp.concatenate([folded["outlier"], folded["other"]], axis=-1), None

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"outlier": (self.dim,)}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        variance = np.diagonal(seen.covariance, axis1=1, axis2=2)
        return {"outlier": choose_outliers(variance + np.square(seen.mean), self.split)}

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return {
            f"{which}_{name}": value
            for which, part in zip(("outlier", "other"), self.parts, strict=True)
            for name, value in part.tables.items()
        }

    def order(self, arrays: Arrays) -> Int[Array, "D"]:
        """All channels, outliers first; a permutation whatever the scores are."""
        return jnp.argsort(-arrays["outlier"], stable=True)

    def _divide(self, arrays: Arrays, x: Float[Array, "*n D"]) -> list[Array]:
        x = jnp.take(x.astype(jnp.float32), self.order(arrays), axis=-1)
        return [x[..., : self.split], x[..., self.split :]]

    def _unite(self, arrays: Arrays, parts: list[Array]) -> Float[Array, "*n D"]:
        return jnp.take(jnp.concatenate(parts, -1), jnp.argsort(self.order(arrays)), axis=-1)

    def _stored(self, stored: Stored) -> list[Stored]:
        return [
            {name: stored[f"{which}_{name}"] for name in ("codes", "scale")}
            for which in ("outlier", "other")
        ]

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        high, low = (
            part.encode({}, piece)
            for part, piece in zip(self.parts, self._divide(arrays, x), strict=True)
        )
        return {f"outlier_{k}": v for k, v in high.items()} | {
            f"other_{k}": v for k, v in low.items()
        }

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        pairs = zip(self.parts, self._stored(stored), strict=True)
        return self._unite(arrays, [part.decode({}, s) for part, s in pairs])

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        pairs = zip(self.parts, self._divide(arrays, q), strict=True)
        high, low = (part.fold_query({}, piece)["q"] for part, piece in pairs)
        return {"outlier": high, "other": low}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        queries = ({"q": folded["outlier"]}, {"q": folded["other"]})
        high, low = (
            part.logits({}, q, s)
            for part, q, s in zip(self.parts, queries, self._stored(stored), strict=True)
        )
        return high + low

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        pairs = zip(self.parts, self._stored(stored), strict=True)
        return jnp.concatenate([part.accumulate({}, weights, s) for part, s in pairs], axis=-1)

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        pieces = zip(self.parts, (acc[:, : self.split], acc[:, self.split :]), strict=True)
        return self._unite(arrays, [part.unfold_output({}, piece, mass) for part, piece in pieces])


def choose_outliers(second_moment: np.ndarray, count: int) -> np.ndarray:
    """The array "outlier" [..., D], float32: 1 for the `count` channels of largest E[x^2], else 0.

    `second_moment` [..., D] (leading axes are heads) from calibration; of equal channels the lower
    one comes first.

    Raises:
      ValueError: count not in 0..D, or second moments negative or not finite.
    """
    moment = np.asarray(second_moment, np.float64)
    dim = moment.shape[-1] if moment.ndim else 0
    if type(count) is not int or not 0 <= count <= dim:
        raise ValueError(f"{count=} must be an integer from 0 to {dim} channels")
    if not np.all(np.isfinite(moment)) or np.any(moment < 0):
        raise ValueError("second_moment must be finite and not negative")
    chosen = np.argsort(-moment, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(moment.shape, np.float32)
    np.put_along_axis(mask, chosen, 1.0, axis=-1)
    return mask
