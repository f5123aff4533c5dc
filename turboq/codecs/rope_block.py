"""Bits by RoPE block: the planes that rotary embedding turns, ordered, in runs of equal bits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.codecs import checks
from turboq.codecs.base import Arrays
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.numbers import rotation as rotations

LAYOUTS = ("half", "interleaved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeBlock(Transform):
    """`transform` without a dense basis: y = R P diag(1/scale) (x - mean), blocks of 2 channels.

    P puts the D/2 blocks in falling order of what their errors cost, so that equal bits lie in one
    of the runs `segments`; blocks beyond them are not stored and decode to the mean. R is a
    randomly signed Hadamard rotation of every run by itself, a constant of `seed`, and spreads what
    is large in a block over its run. Quantizer, codebook and gain are those of `transform`.

    Block i is channels (i, i + rope_dim/2) with layout "half", (2i, 2i + 1) with "interleaved";
    `rope_dim` is how many leading channels are embedded (0: all), the rest pair with neighbours.
    Both channels of a block share place and scale, so a block's norm and angle err alike at every
    position.

    Bits per channel (sum width * bits + gain) / D, whatever D: with ((16, 4), (32, 3), (16, 2)) 3.0
    at D=64, and 3.0625, 3.03125, 3.015625 at D = 64, 128, 256 for the same shares with a gain code
    of 4 bits. Static unless gain is stored. A kernel reads it like `transform`.

    Arrays of one head, float32: mean [D]; place [D/2], the place of each block in the order, a
    permutation of 0..D/2-1; scale [D/2] > 0; and gains, codebook{i} as in `transform`.

    Source: Block-GTQ (arXiv 2606.24033) allocates bits to RoPE blocks and stores runs of equal
    width; mean, scale and the measured curve instead of 4^-b are this project's.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "rope_block"
    source: ClassVar[str] = "Block-GTQ (arXiv 2606.24033)"

    layout: str = "half"
    rope_dim: int = 0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        checks.check_choice("layout", self.layout, LAYOUTS)
        rotations.check_dim_and_seed(self.dim, self.seed)
        if (
            type(self.rope_dim) is not int
            or self.rope_dim % 2
            or not 0 <= self.rope_dim <= self.dim
        ):
            raise ValueError(f"{self.rope_dim=} must be even and 0..{self.dim=} (0: all)")

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().array_shapes
        half = (self.dim // 2,)
        own: dict[str, tuple[int, ...]] = {"mean": (self.dim,), "place": half, "scale": half}
        return own | {n: s for n, s in shapes.items() if n not in ("mean", "analysis", "synthesis")}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        from turboq.codecs.fit_rope_block import fit_observed

        return fit_observed(self, seen)

    @property
    def turn(self) -> np.ndarray:
        """R [C, C], float64, orthogonal: a signed Hadamard rotation per run."""
        matrix, start = np.zeros((self.coded, self.coded)), 0
        for width, _ in self.segments:
            run = slice(start, start + width)
            turn = rotations.Rotation(kind="hadamard", dim=width, seed=self.seed)
            matrix[run, run] = turn.matrix
            start += width
        return matrix

    @property
    def blocks(self) -> Int[np.ndarray, "H 2"]:
        """Channels of every block, [D/2, 2]."""
        return block_channels(self.dim, self.layout, self.rope_dim)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return super().tables | {"rotation": self.turn.astype(np.float32)}

    def analysis_of(self, arrays: Arrays) -> Float[Array, "C D"]:
        return (self._rows(arrays) / self._channel_scale(arrays)[:, None]).T

    def synthesis_of(self, arrays: Arrays) -> Float[Array, "D C"]:
        return self._rows(arrays) * self._channel_scale(arrays)[:, None]

    def _rows(self, arrays: Arrays) -> Float[Array, "D C"]:
        """(R P)^T: row d is R's column of channel d, zero for a channel that is not stored."""
        columns = np.zeros((self.dim, self.coded), np.float32)
        columns[: self.coded] = self.turn.T
        block, side = _inverse(self.blocks)
        at = 2 * arrays["place"].astype(jnp.int32)[block] + jnp.asarray(side, jnp.int32)
        return jnp.asarray(columns).at[at].get(mode="clip")

    def _channel_scale(self, arrays: Arrays) -> Float[Array, "D"]:
        return arrays["scale"][_inverse(self.blocks)[0]]


def block_channels(dim: int, layout: str, rope_dim: int = 0) -> Int[np.ndarray, "H 2"]:
    """Channels of every RoPE block, [D/2, 2]; those that are not embedded pair with neighbours."""
    pairs = np.arange(dim).reshape(-1, 2)
    if layout == "half":
        count = (rope_dim or dim) // 2
        pairs[:count] = np.arange(2 * count).reshape(2, count).T
    return pairs


def _inverse(blocks: Int[np.ndarray, "H 2"]) -> tuple[np.ndarray, np.ndarray]:
    """Block of every channel, and whether it is the block's first or second."""
    order = np.argsort(blocks.reshape(-1))
    return order // 2, order % 2
