"""How one layer's KV heads are stored: the plan, resolved to codecs and arrays, for one layer.

Heads that share both a K codec and a V codec form one group and share arrays and buffers, so the
hot paths are one `vmap` per group (usually one group per layer), never a loop over heads.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Codec
from turboq.numbers.rope import Rope

# In a pytree's place JAX may put shapes, shardings or tracers: arrays are checked where used.
Leaves = dict[str, Any]

EXACT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """Tokens kept exact: the first `sinks` and the last `recent` (the query's own included).

    `exact_dtype` is the storage type of those tokens. First tokens are where attention sinks: kept
    exact they cost a few bytes once (StreamingLLM, arXiv 2309.17453).

    Raises:
      ValueError: a negative count, or a type that is none of float32, bfloat16, float16.

    Examples:
      >>> from turboq import TokenPolicy
      >>> TokenPolicy(sinks=4, recent=64)
      TokenPolicy(sinks=4, recent=64, exact_dtype='bfloat16')
    """

    sinks: int = 0
    recent: int = 0
    exact_dtype: str = "bfloat16"

    def __post_init__(self):
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"{self.sinks=} and {self.recent=} must be zero or more tokens")
        if self.exact_dtype not in EXACT_DTYPES:
            raise ValueError(f"{self.exact_dtype=} must be one of {EXACT_DTYPES}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """KV heads of one layer with the same codecs. Arrays carry a leading axis of len(heads)."""

    k_arrays: Leaves
    v_arrays: Leaves
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    k: Codec = dataclasses.field(metadata={"static": True})
    v: Codec = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayer:
    """One layer of a plan: every KV head is in exactly one group.

    With `rope`, quantized keys are stored before that rotary embedding, or relative to the first
    position of their block of `rope_block` tokens (`turboq.cache.key_form`): turned when encoded,
    turned again when read, at their index in the sequence. Keys come and go rotated, exact tokens
    (sinks, recent window) are kept as they come. None: all keys are stored as they come.
    `window` is how many tokens queries see at most, their own included: a cache may give up others.
    `latent`: values are part of the keys that queries meet (`keys`).
    `joint_heads`: codecs store units of so many heads' keys and values (`turboq.cache.joint`, whose
    arrays `joint` has); None: keys and values of each head.

    Raises:
      ValueError: a window of no token; heads that do not go into units.

    Examples:
      >>> from turboq import TokenPolicy, TurboQuantMSE, uniform_layer
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy(sinks=4))
      >>> layer.kv_heads, layer.bits_per_token  # 2 heads x (K + V) x (64 x 3 + 16)
      (2, 832)
    """

    groups: tuple[HeadGroup, ...]
    policy: TokenPolicy = dataclasses.field(metadata={"static": True})
    rope: Rope | None = dataclasses.field(default=None, metadata={"static": True})
    rope_block: int = dataclasses.field(default=1, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    latent: bool = dataclasses.field(default=False, metadata={"static": True})
    joint_heads: int | None = dataclasses.field(default=None, metadata={"static": True})
    joint: Leaves = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"{self.window=} must be at least 1 token, or None")
        if self.joint_heads is not None and (
            self.joint_heads < 1 or self.kv_heads % self.joint_heads
        ):
            raise ValueError(f"{self.joint_heads=} must divide {self.kv_heads=}")

    @property
    def kv_heads(self) -> int:
        """KV heads of all groups."""
        return sum(len(g.heads) for g in self.groups)

    def check_arrays(self) -> None:
        """Refuses a layer whose codecs lack what they were to be fitted to.

        Raises:
          ValueError: names the heads, the side, the codec and its missing arrays.
        """
        for group in self.groups:
            for side, codec, arrays in (
                ("k", group.k, group.k_arrays), ("v", group.v, group.v_arrays),
            ):  # fmt: skip
                if missing := [name for name in codec.array_shapes if name not in arrays]:
                    raise ValueError(
                        f"{side.upper()} of heads {group.heads}: codec {codec.name} lacks "
                        f"{', '.join(missing)}: give {side}_arrays, what codec.fit returns, or "
                        "take the layer from a plan (Plan.kv_layers)"
                    )

    @property
    def block(self) -> int:
        """Tokens that enter the packed cache together: the largest block of its codecs."""
        return math.lcm(*(c.block for g in self.groups for c in (g.k, g.v)))

    @property
    def ring(self) -> int:
        """Exact tokens kept: the recent window and what waits for its block to fill."""
        return self.policy.recent + self.block - 1

    def stored_until(self, tokens: Any) -> Any:
        """How many of the first `tokens` tokens a query at their end reads packed."""
        return stored_until(self.policy, self.block, tokens)

    def keys(self, k: Float[Array, "*n D"], v: Float[Array, "*n E"]) -> Float[Array, "*n Q"]:
        """What queries meet, of keys and values as they are stored: [..., D] and [..., E]."""
        return latent_keys(k, v) if self.latent else k

    @property
    def bits_per_token(self) -> int:
        """Stored bits of one quantized token, K and V of all heads."""
        return sum(len(g.heads) * (g.k.bits_per_vector + g.v.bits_per_vector) for g in self.groups)


def latent_keys(k: Float[Array, "*n D"], v: Float[Array, "*n E"]) -> Float[Array, "*n Q"]:
    """[v, k]: keys of multi-head latent attention, whose values are the latent vectors."""
    return jnp.concatenate([v, k], axis=-1)


def stored_until(policy: TokenPolicy, block: int, tokens: Any) -> Any:
    """Whole blocks outside the recent window: floor(max(tokens - recent, 0) / block) * block."""
    return jnp.maximum(tokens - policy.recent, 0) // block * block


def in_head_order(layer: KVLayer, x: jax.Array, axis: int) -> jax.Array:
    """Heads that were joined group by group, back in the model's order; no copy if they are."""
    heads = [h for g in layer.groups for h in g.heads]
    if heads == sorted(heads):
        return x
    return jnp.take(x, jnp.argsort(jnp.array(heads)), axis=axis)


def uniform_layer(
    *,
    kv_heads: int,
    k: Codec,
    v: Codec,
    policy: TokenPolicy,
    k_arrays: Arrays | None = None,
    v_arrays: Arrays | None = None,
    rope: Rope | None = None,
    rope_block: int = 1,
    window: int | None = None,
    latent: bool = False,
) -> KVLayer:
    """A layer with one codec for K and one for V of all heads.

    `k_arrays`, `v_arrays`: fitted arrays [kv_heads, ...] by name; none for data-free codecs. The
    rest as in `KVLayer`.

    Examples:
      >>> from turboq import Exact, TokenPolicy, TurboQuantMSE, uniform_layer
      >>> k, v = TurboQuantMSE(dim=64, bits=4), Exact(dim=64)
      >>> uniform_layer(kv_heads=8, k=k, v=v, policy=TokenPolicy()).bits_per_token
      10368
    """
    group = HeadGroup(
        heads=tuple(range(kv_heads)), k=k, v=v, k_arrays=k_arrays or {}, v_arrays=v_arrays or {}
    )
    return KVLayer(
        groups=(group,), policy=policy, rope=rope, rope_block=rope_block, window=window,
        latent=latent,
    )  # fmt: skip
