"""V's inverse transform folded into the output projection: weights once, nothing per token.

    y = sum_h (U_h acc_h + mass_h mean_h + exact_h) W_h
      = sum_h acc_h (U_h W_h) + mass_h (mean_h W_h) + exact_h W_h

with acc in the space of V's codes, U its inverse transform and W_h [E, F] the rows of W_o that
belong to query head h. Exact tokens (sinks, recent window) keep their own product with W_o.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.exact_attention import HIGHEST
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedView
from turboq.codecs.base import Arrays, Codec
from turboq_kernels.attention import base
from turboq_kernels.attention.api import STATIC, check


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedGroup:
    """Projections of one head group's query heads: [N, G, C, F], [N, G, F] and [N, G, E, F]."""

    stored: Any
    mean: Any
    exact: Any


@jax.jit
def fold_output(layer: KVLayer, w_o: Float[Array, "H E F"]) -> tuple[FoldedGroup, ...]:
    """The output projection with V's inverse transform in it, for `projected_attention`.

    Raises:
      ValueError: query heads that are no multiple of the layer's KV heads.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import TokenPolicy, TurboQuantMSE, uniform_layer
      >>> from turboq_kernels import fold_output
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy())
      >>> len(fold_output(layer, jnp.ones((4, 64, 32))))  # [H, D, model width]: one head group
      1
    """
    heads, dim, width = w_o.shape
    if heads % layer.kv_heads:
        raise ValueError(f"{heads=} of w_o must be a multiple of {layer.kv_heads} KV heads")
    by_kv = w_o.astype(jnp.float32).reshape(layer.kv_heads, -1, dim, width)
    folded: list[FoldedGroup] = []
    for group in layer.groups:
        codec, w = group.v, by_kv[jnp.array(group.heads)]
        size = _code_space(codec, group.v_arrays)

        def head(
            arrays: Arrays, w: Array, codec: Codec = codec, size: int = size
        ) -> tuple[Array, Array]:
            turn = codec.unfold_output(arrays, jnp.eye(size), jnp.zeros((size,), jnp.float32))
            mean = codec.unfold_output(arrays, jnp.zeros((1, size)), jnp.ones((1,), jnp.float32))
            stored = jnp.einsum("ce,gef->gcf", turn, w, precision=HIGHEST)
            return stored, jnp.einsum("e,gef->gf", mean[0], w, precision=HIGHEST)

        stored, mean = jax.vmap(head)(group.v_arrays, w)
        folded.append(FoldedGroup(stored=stored, mean=mean, exact=w))
    return tuple(folded)


def _code_space(codec: Codec, arrays: Arrays) -> int:
    """C: the width of the weighted sums that `codec.unfold_output` takes."""
    if codec.reading is not None:
        return codec.reading.width

    def width(arrays: Arrays) -> Array:
        tokens = max(codec.block, 1)
        stored = codec.encode(arrays, jnp.zeros((tokens, codec.dim), jnp.float32))
        return codec.accumulate(arrays, jnp.zeros((1, tokens), jnp.float32), stored)

    return jax.eval_shape(width, {name: x[0] for name, x in arrays.items()}).shape[-1]


@functools.partial(jax.jit, static_argnames=STATIC)
def projected_attention(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache | PagedView,
    tail: Tail,
    folded: tuple[FoldedGroup, ...],
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    splits: int | None = None,
    block_tokens: int = 1024,
) -> Float[Array, "B T F"]:
    """`cache_attention` times W_o, V never turned back: `folded` is `fold_output(layer, w_o)`.

    Raises:
      ValueError: as `cache_attention`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import TokenPolicy, TurboQuantMSE, contiguous, uniform_layer
      >>> from turboq_kernels import fold_output, projected_attention
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy())
      >>> cache = contiguous.init(layer, batch=1, capacity=256)
      >>> k = v = jnp.ones((1, 10, 2, 64))  # [B, T, K, D]
      >>> cache, tail = contiguous.write(layer, cache, k, v)
      >>> q = jnp.ones((1, 1, 4, 64))  # [B, T, H, D]: one new query, two per KV head
      >>> folded = fold_output(layer, jnp.ones((4, 64, 32)))
      >>> out = projected_attention(
      ...     q, layer, cache, tail, folded, q_positions=jnp.asarray([[9]]), scale=64**-0.5
      ... )
      >>> out.shape
      (1, 1, 32)
    """
    check(q, layer, implementation, window)
    options = base.Options(
        scale=scale, window=window, softcap=softcap, implementation=implementation,
        interpret=interpret, splits=splits, block_tokens=block_tokens,
    )  # fmt: skip
    out, product = jnp.float32(0.0), functools.partial(jnp.einsum, precision=HIGHEST)
    for group, buffers, weights in zip(layer.groups, cache.groups, folded, strict=True):
        parts = base.group_parts(
            q, layer, cache, group, buffers, tail,
            q_positions=q_positions, options=options, sink_logits=sink_logits,
        )  # fmt: skip
        tokens = q.shape[1]
        out = out + product("btngc,ngcf->btf", base.from_rows(parts.stored, tokens), weights.stored)
        mass = base.from_rows(parts.mass[..., None], tokens)[..., 0]
        out = out + product("btng,ngf->btf", mass, weights.mean)
        if parts.exact is not None:
            exact = base.from_rows(parts.exact, tokens)
            out = out + product("btnge,ngef->btf", exact, weights.exact)
    return out
