"""KVQuant-style non-uniform per-channel codes with a fixed number of exact outliers per vector.

    u_c = (x_c - center_c) / scale_c,  code = nearest(codebook, u),  x_hat = center + scale codebook
    the m largest |u| of a vector: stored again as (channel index, value), x_hat = that value

with m = ceil(D outlier_permille / 1000): 1, 2, 3 at D = 64, 128, 256 for KVQuant's 1 %.

What is done: per-channel normalisation to [-1, 1] over the central 99 % of calibration samples, one
codebook per head, optimal weighted k-means, optionally weighted by sensitivity
(KVQuant: the squared gradient); outliers dense and sparse. What is not: KVQuant's count of outliers
varies per vector (compressed sparse rows) where this one is fixed; its Q-Norm (mean and deviation
of the codebook corrected afterwards) and its per-token, dynamic normalisation of values are left
out; first tokens exact is TokenPolicy(sinks=1).

Keys before RoPE: KVQuant codes those and rotates when reading; here a plan says so for any codec
(`turboq.plan.SidePlan.rope`). The codec itself does not care: fit it to the keys that are stored.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored, stack
from turboq.codecs.minifloat import divide
from turboq.codecs.observed import Observed
from turboq.codecs.scalar import lead
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers import codebook as codebooks
from turboq.numbers import codebook_fitting as fitting

MAX_DIM = 256  # indices are codes of at most 8 bits
GROUPS = 2**13  # values that a codebook's fit merges its samples into: 32 for each of 256 levels
DEAD = 1e-30  # stands for scale 0: any deviation of a channel that never varied is an outlier


@dataclasses.dataclass(frozen=True, kw_only=True)
class NUQ(TransformedCodec):
    """Codes of `bits` bits, then m outliers of ceil(log2 D) index bits and one `value_dtype` each.

    All-in bits per channel at D = 64, 128, 256: bits + 0.344, 0.359, 0.281 with float16 values
    (the code of an outlier's channel is stored too). Static. A kernel could read the codes directly
    and add m sparse terms; none does yet.

    Arrays of one head, float32: channel_center [D], channel_scale [D] (units of x), codebook
    [2**bits] ascending, in units of the scale.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "nuq"
    source: ClassVar[str] = "KVQuant (arXiv 2401.18079) sections 3.1, 3.3, 3.4"
    needs: ClassVar[tuple[str, ...]] = ("sample",)

    bits: int
    outlier_permille: int = 10
    value_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        checks.check_bits(self.bits)
        checks.check_choice("value_dtype", self.value_dtype, checks.DTYPES)
        if self.dim > MAX_DIM:
            raise ValueError(f"dim={self.dim} must be at most {MAX_DIM}: indices have 8 bits")
        permille = self.outlier_permille
        if type(permille) is not int or not 0 <= permille <= 50:
            raise ValueError(f"outlier_permille={permille} must be 0..50 (KVQuant: 10)")

    @property
    def outliers(self) -> int:
        """Outliers per vector, m."""
        return -(-self.dim * self.outlier_permille // 1000)

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = Field(name="codes", width=self.dim, bits=self.bits, dtype="codes")
        if not self.outliers:
            return (codes,)
        index_bits = (self.dim - 1).bit_length()
        bits = checks.DTYPE_BITS[self.value_dtype]
        return (
            codes,
            Field(name="index", width=self.outliers, bits=index_bits, dtype="codes"),
            Field(name="value", width=self.outliers, bits=bits, dtype=self.value_dtype),
        )

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "channel_center": (self.dim,),
            "channel_scale": (self.dim,),
            "codebook": (2**self.bits,),
        }

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        return stack([fit_nuq(self, x) for x in seen.x])

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        scale = arrays["channel_scale"]
        safe = lead(jnp.where(scale > 0, scale, DEAD), y.ndim)
        u = divide(y - lead(arrays["channel_center"], y.ndim), safe)
        stored = {"codes": codebooks.nearest(arrays["codebook"], u)}
        if self.outliers:
            index = jax.lax.top_k(jnp.abs(u), self.outliers)[1]
            value = jnp.take_along_axis(y, index, axis=-1)
            stored["index"] = index.astype(jnp.uint8)
            stored["value"] = value.astype(self.value_dtype)
        return stored

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        codes = stored["codes"]
        y = codebooks.lookup(arrays["codebook"], codes) * lead(arrays["channel_scale"], codes.ndim)
        y = y + lead(arrays["channel_center"], codes.ndim)
        channel = jnp.arange(self.dim, dtype=jnp.uint8).reshape((1,) * (codes.ndim - 1) + (-1,))
        for j in range(self.outliers):  # at most 13: m selects cost less than a scatter
            here = channel == stored["index"][..., j, None]
            y = jnp.where(here, stored["value"][..., j, None].astype(jnp.float32), y)
        return y


def fit_nuq(
    codec: NUQ, samples: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Arrays of one head from samples [n, D] (any keys or values; the codec's rotation applies).

    center and scale map the central 1 - outlier_permille/1000 of each channel's samples to [-1, 1].
    The codebook minimises sum w (x - x_hat)^2 over the samples inside, w = `weights` [n, D] (None:
    one), hence w scale^2 in normalised units. With a rotation, weights are refused: they are per
    channel of x.

    Raises:
      ValueError: samples not [n, D], empty or not finite, or weights of another shape.
    """
    x = np.asarray(samples, np.float64)
    if x.ndim != 2 or x.shape[1] != codec.dim or not len(x):
        raise ValueError(f"samples {x.shape=} must be [n, {codec.dim}] with n > 0")
    if not np.all(np.isfinite(x)):
        raise ValueError("samples must be finite: NaN or Inf found")
    if codec.rotation != "identity":
        if weights is not None:
            raise ValueError(f"weights need rotation='identity', not {codec.rotation!r}")
        size = codec.turn.dim
        x = (x.reshape(len(x), -1, size) @ codec.turn.matrix.T).reshape(x.shape)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if w.shape != x.shape:
        raise ValueError(f"weights {w.shape=} must be {x.shape}")
    tail = codec.outlier_permille / 2000
    low, high = np.quantile(x, [tail, 1 - tail], axis=0)
    center, scale = (high + low) / 2, (high - low) / 2
    inside = (x >= low) & (x <= high) & (scale > 0)
    arrays = {"channel_center": center, "channel_scale": scale}
    if np.any(inside):
        u = ((x - center) / np.where(scale > 0, scale, 1.0))[inside]
        table = fitting.fit_samples(u, (w * scale**2)[inside], 2**codec.bits, most=GROUPS)
    else:  # a head that never varies: every code decodes to its center
        table = np.zeros(2**codec.bits)
    return {k: v.astype(np.float32) for k, v in (arrays | {"codebook": table}).items()}
