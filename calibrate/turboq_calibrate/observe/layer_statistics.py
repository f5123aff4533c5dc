"""Statistics of one layer, and what a codec's fit may use of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.numbers.rope import Rope, rotate
from turboq.plan.geometry import ROPE_FORMS, RopeForm, rope_block
from turboq_calibrate.models.spec import LayerSpec
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.blocks import in_blocks
from turboq_calibrate.observe.reservoir import Tokens
from turboq_calibrate.observe.statistics import SideStatistics

NO_TOKENS = (
    "these statistics hold no sampled tokens (--reservoir=0): run `turboq calibrate "
    "--reservoir=4096` into a new folder"
)


def sizes(spec: LayerSpec) -> dict[str, tuple[int, int]]:
    """Heads and dim of every side that a layer has."""
    k, v, q = (
        (spec.kv_heads, spec.head_dim),
        (spec.kv_heads, spec.v_head_dim),
        (spec.heads, spec.head_dim),
    )
    before = {} if spec.rope is None else {"k_before": k, "q_before": q}
    return {"k": k, "v": v, "q": q} | before


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one layer by side; `read_tokens` reads the reservoir's file, None without."""

    sides: Mapping[str, SideStatistics]
    rotary: Rope | None = None
    read_tokens: Callable[[], Tokens] | None = None

    @property
    def k(self) -> SideStatistics:
        return self.sides["k"]

    @property
    def v(self) -> SideStatistics:
        return self.sides["v"]

    @property
    def q(self) -> SideStatistics:
        return self.sides["q"]

    @property
    def k_before(self) -> SideStatistics:
        """Keys before their rotary embedding; the keys themselves in a layer without one."""
        return self.sides.get("k_before", self.k)

    @property
    def q_before(self) -> SideStatistics:
        """The same of queries: counts, sums and second moments only."""
        return self.sides.get("q_before", self.q)

    def tokens(self) -> Tokens:
        """The sampled tokens of this layer, read and checked now.

        Raises:
          TurboqError: there is no reservoir, or its file is damaged.
        """
        if self.read_tokens is None:
            raise TurboqError(NO_TOKENS)
        return self.read_tokens()

    def observed(self, side: str, rope: RopeForm = "after") -> Observed:
        """What a fit of `side` ("k" or "v") may use.

        Args:
          rope: keys, their gradients and queries "after" or "before" rotary embedding, or relative
            to their "block:P" of positions (`turboq.cache.key_form`); values and
            layers without one are the same either way.

        Raises:
          TurboqError: there is no reservoir, or its file is damaged.
          ValueError: another side or rope.
        """
        if side not in ("k", "v") or rope not in ROPE_FORMS:
            raise ValueError(f"{side=} must be 'k' or 'v', {rope=} one of {ROPE_FORMS}")
        tokens = self.tokens()
        rotary = self.rotary if side == "k" and rope == "after" else None
        found = self.v if side == "v" else self.k if rope == "after" else self.k_before
        x, g = (tokens.k, tokens.g_k) if side == "k" else (tokens.v, tokens.g_v)
        if rotary is not None:
            at = jnp.asarray(tokens.position, jnp.int32)[:, None]
            x, g = (np.asarray(rotate(rotary, jnp.asarray(y), at)) for y in (x, g))
        queries = None
        if side == "k":
            queries = grouped_moment(self.q if rope == "after" else self.q_before, found.heads)
        seen = Observed(
            x=_by_head(x), g=_by_head(g), text=tokens.text, tokens=int(found.count.max()),
            mean=found.mean, covariance=found.covariance, metric=found.metric,
            weighted_mean=found.weighted_mean, weighted_covariance=found.weighted_covariance,
            queries=queries, rope_layout="none" if rotary is None else rotary.layout,
            rope_dim=None if rotary is None else rotary.dim,
        )  # fmt: skip
        if side == "v" or self.rotary is None or rope in ("after", "before"):
            return seen
        return in_blocks(seen, self.rotary, rope_block(rope), tokens.position)


def grouped_moment(q: SideStatistics, kv_heads: int) -> Float[np.ndarray, "K D D"]:
    """E[q q^T] over the query heads that read each KV head."""
    second = q.arrays["second"].reshape(kv_heads, -1, q.dim, q.dim).sum(axis=1)
    count = q.count.reshape(kv_heads, -1).sum(axis=1)
    return second / np.maximum(count, 1)[:, None, None]


def _by_head(x: Float[np.ndarray, "N K D"]) -> Float[np.ndarray, "K N D"]:
    return np.ascontiguousarray(np.swapaxes(x, 0, 1))


def merge(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """Sides of the union of two disjoint sets of tokens; `reservoir.join` joins the samples.

    Raises:
      TurboqError: different sides, heads or rotary embeddings.
    """
    if a.sides.keys() != b.sides.keys() or a.rotary != b.rotary:
        raise TurboqError(
            f"cannot merge statistics: sides {sorted(a.sides)} and {sorted(b.sides)} or their "
            "rotary embeddings differ"
        )
    return LayerStatistics(
        sides={s: st.merge_sides(a.sides[s], b.sides[s]) for s in a.sides}, rotary=a.rotary
    )
