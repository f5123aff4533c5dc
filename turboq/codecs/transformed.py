"""What codecs share that store transformed vectors: y = T (x - mean), y_hat from the stored fields.

    x_hat = mean + T^-1 y_hat,   q . x_hat = q . mean + (T^-T q) . y_hat,   p x_hat = (p y_hat) T^-T

A subclass says how y is stored (`quantize`, `dequantize`); transform and mean are folded into the
query and the output once, so reading the cache costs one `dequantize` and one product.
"""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.scalar import dot, lead
from turboq.numbers import rotation as rotations


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformedCodec(Codec):
    """Base of codecs with an orthogonal transform (fixed rotation by default) and optional mean.

    A subclass with fitted arrays "transform" [D, D] (rows are new axes, orthogonal) or "mean" [D]
    gets them applied; otherwise the fixed `rotation` of (kind, seed) applies, to the whole vector
    or to each run of `rotation_block` coordinates (0: the whole vector).
    """

    rotation: str = "identity"
    rotation_block: int = 0
    seed: int = 0

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_choice("rotation", self.rotation, rotations.KINDS)
        rotations.check_dim_and_seed(self.dim, self.seed)
        block = self.rotation_block
        if type(block) is not int or block < 0 or (block and self.dim % block):
            raise ValueError(f"rotation_block={block} must be 0 or a divisor of dim={self.dim}")

    @abc.abstractmethod
    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        """Stored fields of transformed vectors."""

    @abc.abstractmethod
    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        """Transformed vectors, float32, from stored fields."""

    @property
    def turn(self) -> rotations.Rotation:
        """The fixed rotation of one run of coordinates."""
        dim = self.rotation_block or self.dim
        return rotations.Rotation(kind=self.rotation, dim=dim, seed=self.seed)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        if self.rotation == "identity":
            return {}
        return {"rotation": self.turn.matrix.astype(np.float32)}

    def forward(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """T x, for vectors and queries alike (T is orthogonal)."""
        if "transform" in arrays:
            return _times(x, arrays["transform"].T)
        return self._blocks(self.turn.apply, x)

    def backward(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """T^T y."""
        if "transform" in arrays:
            return _times(y, arrays["transform"])
        return self._blocks(self.turn.invert, y)

    def _blocks(self, turn, x):
        size = self.rotation_block or self.dim
        return turn(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        x = x.astype(jnp.float32)
        if "mean" in arrays:
            x = x - lead(arrays["mean"], x.ndim)
        return self.quantize(arrays, self.forward(arrays, x))

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        x = self.backward(arrays, self.dequantize(arrays, stored))
        return x + lead(arrays["mean"], x.ndim) if "mean" in arrays else x

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        q = q.astype(jnp.float32)
        folded = {"q": self.forward(arrays, q)}
        if "mean" in arrays:
            folded["offset"] = dot(q, arrays["mean"][:, None])[:, 0]
        return folded

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        scores = dot(folded["q"], self.dequantize(arrays, stored).T)
        return scores + folded["offset"][:, None] if "offset" in folded else scores

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights, self.dequantize(arrays, stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        out = self.backward(arrays, acc)
        return out + mass[:, None] * arrays["mean"][None, :] if "mean" in arrays else out


def _times(x: Float[Array, "*n D"], matrix: Float[Array, "D C"]) -> Float[Array, "*n C"]:
    return dot(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], -1)
