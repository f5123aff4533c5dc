"""Dispatch of the prefill kernels: many query rows over stored tokens, and over exact ones.

`history` means what `turboq_kernels.decode.decode` does, for hundreds to thousands of rows; `own`
is flash attention over exact keys and values. Both return one part of a softmax; "xla" reads stored
tokens by `decode.base` and keeps all logits of exact ones in memory (`merge.exact`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.exact_attention import without_broken
from turboq_kernels import merge
from turboq_kernels.decode import api as decoding
from turboq_kernels.decode.types import Pages, Partial, Side
from turboq_kernels.target import too_old

IMPLEMENTATIONS = decoding.IMPLEMENTATIONS
_MODULES = {
    "mosaic_tpu": "turboq_kernels.prefill.mosaic_tpu",
    "triton": "turboq_kernels.prefill.triton",
}
# What None tries before "xla", by the platform that runs the arrays.
_PREFERENCE = {"tpu": "mosaic_tpu", "gpu": "triton"}


@functools.partial(
    jax.jit,
    static_argnames=("scale", "softcap", "splits", "implementation", "interpret", "block_tokens"),
)
def history(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    bias: Float[Array, "B N M"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    splits: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    block_tokens: int | None = None,
) -> Partial:
    """Attention of M query rows over the stored tokens each may see; any M.

    Arguments and result are those of `turboq_kernels.decode.decode`. A kernel unpacks a page once
    for a tile of rows and skips pages that no row of the tile sees: consecutive rows should see
    about the same slots. `splits` and `block_tokens` are for "xla".

    Raises:
      ValueError: shapes that do not match, an unknown implementation, or a named one that does not
        support the case (the message says why).
      ImportError: this JAX lacks the backend that the platform's kernel is written in.
    """
    decoding.check(q, k, v, pages, starts, ends)
    name = choose(q, k, v, pages, implementation, interpret)
    if name == "xla":
        return decoding.decode(
            q, k, v, pages, starts, ends, bias=bias, scale=scale, softcap=softcap, splits=splits,
            implementation="xla", block_tokens=block_tokens,
        )  # fmt: skip
    return importlib.import_module(_MODULES[name]).history(
        q, k, v, pages, starts, ends, bias=bias, scale=scale, softcap=softcap, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "implementation", "interpret"))
def own(
    q: Float[Array, "B N M D"],
    k: Float[Array, "B N R D"],
    v: Float[Array, "B N R E"],
    positions: Int[Array, "B R"],
    lower: Int[Array, "B M"],
    upper: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Partial:
    """Attention of M query rows over R exact keys and values.

    Row m sees entry r iff 0 <= positions[b, r] and lower[b, m] <= positions[b, r] <= upper[b, m].
    An entry that a row does not see may hold anything; one that it sees and that holds Inf or NaN
    makes that row's result NaN. A kernel takes every shape and keeps
    no M x R array; it skips tiles of entries that no row of a tile of rows sees, so positions
    should be about ascending.

    Raises:
      ValueError: an unknown implementation, or a GPU too old for one that is named (ImportError: as
        `history`).
    """
    name = _choose(implementation, interpret, lambda name: too_old() if name == "triton" else None)

    def seen():
        s = positions[:, None, :]
        return (s >= 0) & (s >= lower[..., None]) & (s <= upper[..., None])

    if name == "xla":
        return merge.exact(q, k, v, seen(), scale=scale, softcap=softcap)
    (k, broken_k), (v, broken_v) = without_broken(k), without_broken(v)
    part = importlib.import_module(_MODULES[name]).own(
        q, k, v, positions, lower, upper, scale=scale, softcap=softcap, interpret=interpret
    )
    broken = broken_k | broken_v

    def acc():  # a reduction over [B, N, M, R] that is never in memory, and rarely needed
        theirs = jnp.any(seen()[:, None] & broken[:, :, None], axis=-1)
        return jnp.where(theirs[..., None], jnp.nan, part.acc)

    return dataclasses.replace(part, acc=jax.lax.cond(jnp.any(broken), acc, lambda: part.acc))


def choose(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    implementation: str | None,
    interpret: bool = False,
) -> str:
    """The implementation that `history` takes.

    Raises:
      ValueError: unknown, or named and not able to.
    """

    def unable(name: str) -> str | None:
        return importlib.import_module(_MODULES[name]).unsupported(q, k, v, pages)

    return _choose(implementation, interpret, unable)


def _choose(implementation: str | None, interpret: bool, unable) -> str:
    if implementation is None:
        if interpret:
            raise ValueError(f"{interpret=} needs a named implementation: 'mosaic_tpu' or 'triton'")
        name = _PREFERENCE.get(jax.default_backend(), "xla")
        return "xla" if name == "xla" or unable(name) is not None else name
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    reason = None if implementation == "xla" else unable(implementation)
    if reason is not None:
        raise ValueError(f"{implementation=} cannot run this case: {reason}; use 'xla' or None")
    return implementation
