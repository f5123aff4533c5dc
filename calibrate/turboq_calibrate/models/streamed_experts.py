"""A mixture of experts whose matrices are read a group at a time, forwards and backwards.

Only the experts that some token chose are read, and only one group of them is in memory: at most
`GROUP_BYTES` or one expert, besides the rest of the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq_calibrate.models import experts, stream
from turboq_calibrate.models.primitives import Params, add
from turboq_calibrate.models.spec import LayerSpec

GROUP_BYTES = 2**28

_jit = functools.partial(jax.jit, static_argnames=("spec",))


@jax.tree_util.register_pytree_node_class
class Streamed(dict[str, Array]):
    """A layer's weights but its experts', which `read` reads: numbers -> stacked matrices.

    Compiled functions take it for the weights that it holds, and cannot use the experts.
    """

    def __init__(self, weights: Params, read: Callable[[Int[np.ndarray, "G"]], Params], size: int):
        super().__init__(weights)
        self.read, self.size = read, size  # bytes of one expert

    def tree_flatten(self) -> tuple[tuple[Array, ...], tuple[str, ...]]:
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], weights: tuple[Any, ...]) -> Params:
        return dict(zip(names, weights, strict=True))


def whole(spec: LayerSpec, params: Params) -> Params:
    """All weights of a layer at once."""
    if not isinstance(params, Streamed):
        return params
    assert spec.experts is not None
    return {**params, **params.read(np.arange(spec.experts.count))}


def group_size(spec: LayerSpec, params: Streamed) -> int:
    """Experts that are in memory at a time."""
    assert spec.experts is not None
    return min(spec.experts.count, max(1, GROUP_BYTES // params.size))


def group_bytes(spec: LayerSpec, params: Params) -> int:
    """Bytes of one group; none where all weights are in `params`."""
    return group_size(spec, params) * params.size if isinstance(params, Streamed) else 0


def groups(
    spec: LayerSpec, params: Streamed, chosen: Int[Array, "N k"]
) -> Iterator[tuple[Int[np.ndarray, "G"], Params]]:
    """(numbers, matrices) of the chosen experts, in groups of one size."""
    assert spec.experts is not None
    count, size = spec.experts.count, group_size(spec, params)
    used = np.unique(np.asarray(chosen))
    for start in range(0, len(used), size):
        numbers = used[start : start + size]
        read = params.read(numbers)
        pad = size - len(numbers)
        if pad:  # one shape, one compilation
            read = {n: jnp.pad(w, [(0, pad)] + [(0, 0)] * (w.ndim - 1)) for n, w in read.items()}
        yield np.concatenate([numbers, np.full(pad, count)]).astype(np.int32), read


def feed_forward(
    spec: LayerSpec, params: Streamed, x: Float[Array, "B T M"]
) -> Float[Array, "B T M"]:
    """`decoder.join_feed_forward`."""
    n, chosen, weights, y = _before(spec, params, x)
    return _after(spec, params, x, _sum(spec, params, y, n, chosen, weights))


def feed_forward_gradient(
    spec: LayerSpec, params: Streamed, x: Float[Array, "B T M"], g: Float[Array, "B T M"]
) -> Float[Array, "B T M"]:
    """The gradient at `x` of `feed_forward` from `g` at its output."""
    n, chosen, weights, y = _before(spec, params, x)
    if spec.post_norms:  # else a plain sum, whose gradient does not depend on it
        y = _sum(spec, params, y, n, chosen, weights)
    g_x, g_y = _after_gradient(spec, params, x, y, g)
    g_n, g_w = jnp.zeros_like(n), jnp.zeros_like(weights)
    for numbers, group in groups(spec, params, chosen):
        g_n, g_w = _group_gradient(spec, group, numbers, n, chosen, weights, g_y, g_n, g_w)
    return _before_gradient(spec, params, x, g_x, (g_n, g_w, g_y))


def _sum(spec: LayerSpec, params: Streamed, y: Array, n: Array, chosen: Array, weights: Array):
    for numbers, group in groups(spec, params, chosen):
        y = _add_chosen(spec, group, numbers, y, n, chosen, weights)
    return y


def _joined(spec: LayerSpec, params: Params, x: Array, y: Array) -> Array:
    y = experts.leave(spec, params, x, y)
    return stream.leave(spec, params, add(spec, params, x, y, "mlp_post_norm"))


_before, _after, _add_chosen = _jit(experts.enter), _jit(_joined), _jit(experts.add_chosen)


@_jit
def _after_gradient(spec: LayerSpec, params: Params, x: Array, y: Array, g: Array):
    return jax.vjp(functools.partial(_joined, spec, params), x, y)[1](g)


@_jit
def _group_gradient(spec, params, numbers, n, chosen, weights, g, g_n, g_w):
    def added(n, weights):
        return experts.add_chosen(spec, params, numbers, jnp.zeros_like(n), n, chosen, weights)

    more_n, more_w = jax.vjp(added, n, weights)[1](g)
    return g_n + more_n, g_w + more_w


@_jit
def _before_gradient(spec: LayerSpec, params: Params, x: Array, g_x: Array, g: tuple[Array, ...]):
    def prepared(x):
        n, _, weights, y = experts.enter(spec, params, x)
        return n, weights, y

    return g_x + jax.vjp(prepared, x)[1](g)[0]
