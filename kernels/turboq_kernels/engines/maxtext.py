"""MaxText (and JetStream): an object with the methods of its `KVQuant`, storing rotated codes.

    install(TurboQuantMSE(dim=128, bits=4))     before the model is made; quantize_kvcache=true

MaxText keeps codes [..., D] in one integer type and one bfloat16 number per token and head, asks
`quantize` for both, and multiplies through the einsums that this object hands out:

    codes = code - 2^(b-1),  scale = s * limit        quantize; limit is what MaxText divides by
    q . k_hat = (R q) . c[codes] s                    einsum_fn_with_rhs_qtensor
    p v_hat = (p (c[codes] s)) R                      einsum_fn_with_rhs_qtensor_and_dequant

so that the rotation R is applied to queries and outputs, never to the cache. K, V and all layers
share the codec, which is not told which it has: nothing fitted. Codes of 2 to 4 bits take 4 (int4),
of 5 to 8 bits 8: their types, not ours, so `turboq export --engine=maxtext` counts the same bytes.

Read: MaxText 0.2.5 (`inference/kvcache.py`, `layers/attention_op.py`, `layers/quantizations.py`).
Its `KVCache` was run with this on a CPU, a prompt and a step; a model of it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.codecs import TurboQuantMSE

# What `KVCache.get_cached_values` divides a stored scale by, and the axis name of channels.
LIMITS = {"int4": 7.5, "int8": 127.5}
CHANNELS = "cache_kv"


class KVQuant:
    """MaxText's interface over one data-free codec.

    Raises:
      ValueError: a head dim of MaxText's arrays that is not the codec's, or a product whose last
        axes are not channels; a codec with a fitted mean.
    """

    axis_cfg = "dkv"  # one scale per token and head

    def __init__(self, codec: TurboQuantMSE):
        if codec.mean:
            raise ValueError(f"{codec.mean=} must be False: MaxText's cache has no place for it")
        self.codec = codec
        self.dtype = jnp.int4 if codec.bits <= 4 else jnp.int8
        self._limit = LIMITS[jnp.dtype(self.dtype).name]
        self._zero = 1 << (codec.bits - 1)

    def quantize(
        self, kv: Float[Array, "..."], axis_names: Sequence[str]
    ) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
        """Codes in kv's order of axes, and scales with one channel."""
        axis = list(axis_names).index(CHANNELS)
        x = jnp.moveaxis(kv, axis, -1)
        if x.shape[-1] != self.codec.dim:
            raise ValueError(f"{x.shape[-1]} channels are not the {self.codec.dim} of {self.codec}")
        stored = self.codec.encode({}, x)
        codes = (stored["codes"].astype(jnp.int32) - self._zero).astype(self.dtype)
        scale = (stored["scale"].astype(jnp.float32) * self._limit).astype(jnp.bfloat16)
        return jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scale, -1, axis)

    def einsum_fn_with_rhs_qtensor(self, **modes: Any) -> Callable[..., Array]:
        """einsum(equation, queries, keys): turns the queries."""
        return self._keys

    def einsum_fn_with_rhs_qtensor_and_dequant(self) -> Callable[..., Array]:
        """einsum(equation, weights, values): turns the outputs back."""
        return self._values

    def _keys(self, equation: str, q: Array, k: Any) -> Array:
        if not hasattr(k, "qvalue"):  # a prompt's own keys, not from the cache
            return jnp.einsum(equation, q, k)
        (left, right), _ = _operands(equation)
        _last(equation, left, right)
        turned = self.codec.turn.apply(q.astype(jnp.float32))
        return jnp.einsum(equation, turned, self._levels(k)).astype(q.dtype)

    def _values(self, equation: str, weights: Array, v: Any) -> Array:
        if not hasattr(v, "qvalue"):
            return jnp.einsum(equation, weights, v)
        (_, right), out = _operands(equation)
        _last(equation, right, out)
        acc = jnp.einsum(equation, weights.astype(jnp.float32), self._levels(v))
        return self.codec.turn.invert(acc).astype(weights.dtype)

    def _levels(self, tensor: Any) -> Float[Array, "..."]:
        """Rotated vectors of a tensor whose scale MaxText has divided by its limit."""
        (scale,) = tensor.scale
        levels = self.codec.codebook_of({})[tensor.qvalue.astype(jnp.int32) + self._zero]
        return levels * scale.astype(jnp.float32)


def install(codec: TurboQuantMSE, quantizations: Any = None) -> None:
    """Makes MaxText's decoders quantize with `codec` where their config says `quantize_kvcache`.

    Args:
      quantizations: MaxText's module of that name; imported by default.

    Raises:
      ImportError: MaxText is not installed.
    """
    if quantizations is None:
        from maxtext.layers import quantizations  # pyright: ignore[reportMissingImports]
    quantizations.configure_kv_quant = lambda config: (
        KVQuant(codec) if config.quantize_kvcache else None
    )


def _operands(equation: str) -> tuple[tuple[str, str], str]:
    inputs, _, out = equation.partition("->")
    left, right = inputs.split(",")
    return (left, right), out


def _last(equation: str, one: str, other: str) -> None:
    if one[-1] != other[-1]:
        raise ValueError(f"{equation=}: the last axes of {one} and {other} must be the channels")
