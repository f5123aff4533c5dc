"""`qwix.QArray` from stored fields: the container that tokamax's attention takes as it is.

    value = (qvalue - zero_point) * scale,  scale and zero_point per tile

qvalue and zero_point have one type of at most a byte. Symmetric integers, FP8 and integers with an
integer zero point have that form; codecs with a minimum of their own (it lies between two codes) or
a table of values have not. A QArray holds vectors in the codec's rotated space: queries go through
`codec.fold_query`, outputs through `codec.unfold_output`, as for every other kernel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.cache.layer import KVLayer
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.ggml import Ggml
from turboq.codecs.ggml_blocks import TYPES
from turboq.codecs.int_token_head import Int4TokenHead, Int8TokenHead
from turboq.codecs.minifloat import E2M1, E4M3
from turboq.codecs.nvfp4 import NVFP4
from turboq.codecs.per_channel import PerChannel
from turboq.errors import TurboqError
from turboq.export.base import (
    Exporter,
    Formats,
    Held,
    Options,
    Projection,
    Tensors,
    entries,
    exact_held,
    model_dtype,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints, match

FILE = "turboq_qarrays.py"
WHY = "a float minimum or a table of values"
EXTRA = "pip install qwix tokamax"
GGML_TYPES = ("q8_0", "q5_0", "q4_0")
NAMES = ("fp8", "nvfp4", "int8_token_head", "int4_token_head")

_SOURCE = '''"""K and V of {model} as qwix.QArray, written by turboq from plan {hash}.

    k, v = layer(0, keys, values)                     [B, S, K, D] each
    out = tokamax.dot_product_attention(q, k, v)      q [B, T, H, D], rotated as the codec says
"""

from pathlib import Path

from turboq.export.qwix_arrays import layer_qarrays
from turboq.plan import load

PLAN, ARRAYS = load(Path(__file__).parent / "engine_plan")


def layer(index, keys, values):
    """Quantizes keys and values of one layer."""
    return layer_qarrays(PLAN.kv_layer(index, ARRAYS), keys, values)
'''


def representable(codec: Codec) -> bool:
    """Whether a codec's values are (integer or small float - zero point) * scale."""
    if isinstance(codec, Ggml):
        return codec.type in GGML_TYPES
    if isinstance(codec, PerChannel):
        return codec.form == "symmetric"
    return codec.name in NAMES


def qarray(codec: Codec, arrays: Arrays, stored: Stored) -> Any:
    """QArray [*n, S, D] of one head's stored fields, in the codec's rotated space.

    Raises:
      TurboqError: qwix is not installed, or the codec's values are not of that form.
    """
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TurboqError(f"qwix is not installed: {EXTRA}") from None
    value, scale, zero = parts(codec, arrays, stored)
    return qwix.QArray(qvalue=value, scale=scale, zero_point=zero)


def parts(codec: Codec, arrays: Arrays, stored: Stored) -> tuple[Array, Array, Array | None]:
    """(qvalue, scale, zero_point) of `qarray`; scale and zero point have the rank of qvalue.

    Raises:
      TurboqError: the codec's values are not of that form.
    """
    if not representable(codec):
        raise TurboqError(f"codec {codec.name}: a QArray cannot hold {WHY}")
    codes = stored["codes"]
    signed = codes.astype(jnp.int32)
    if isinstance(codec, PerChannel):
        scale = arrays["channel_scale"].reshape((1,) * (codes.ndim - 1) + (-1,))
        return (signed - 2 ** (codec.bits - 1)).astype(jnp.int8), scale, None
    if isinstance(codec, FP8):
        kind = jnp.float8_e4m3fn if codec.format == "e4m3" else jnp.float8_e5m2
        one = jnp.asarray(arrays.get("scale", 1.0), jnp.float32)
        scale = stored.get("scale", jnp.reshape(one, [1] * codes.ndim))
        return jax.lax.bitcast_convert_type(codes, kind), scale, None
    if isinstance(codec, NVFP4):
        halves = (2 * E2M1.decode(codes)).astype(jnp.int8)
        return halves, E4M3.decode(stored["block_scale"]) * (arrays["scale"] / 2), None
    if isinstance(codec, Int8TokenHead):
        return jax.lax.bitcast_convert_type(codes, jnp.int8), stored["scale"], None
    if isinstance(codec, Int4TokenHead):
        bits = jax.lax.bitcast_convert_type(stored["scale"], jnp.int32)
        scale = jax.lax.bitcast_convert_type(bits & jnp.int32(-16), jnp.float32)
        zero = (bits & jnp.int32(15)).astype(jnp.int8)
        return codes.astype(jnp.int8), scale * jnp.float32(codec.dim**-0.5), zero
    assert isinstance(codec, Ggml)
    middle = 2 ** (TYPES[codec.type].bits - 1)
    return (signed - middle).astype(jnp.int8), stored["scale"].astype(jnp.float32), None


def layer_qarrays(
    layer: KVLayer, k: Float[Array, "B S K D"], v: Float[Array, "B S K E"]
) -> tuple[Any, Any]:
    """K and V of one layer, quantized, as QArrays [B, S, K, D] that `tokamax` takes.

    Raises:
      TurboqError: the heads of the layer have different codecs, or one that a QArray cannot hold,
        or its keys are stored before their rotary embedding.
    """
    if layer.rope is not None:
        raise TurboqError("keys before RoPE: attention over a QArray takes keys as they are stored")
    if len(layer.groups) != 1:
        raise TurboqError("heads of one layer must share their codecs: a QArray holds one format")
    (group,) = layer.groups

    def one(codec: Codec, arrays: Arrays, x: Array):
        return qarray(codec, arrays, codec.encode(arrays, x))

    def heads(codec: Codec, arrays: Arrays, x: Array):
        return jax.vmap(lambda a, y: one(codec, a, y), in_axes=(0, 2), out_axes=2)(arrays, x)

    return heads(group.k, group.k_arrays, k), heads(group.v, group.v_arrays, v)


class Qwix(Exporter):
    """A module that quantizes a layer's K and V into QArrays."""

    name = "qwix"
    title = "JAX: qwix.QArray, tokamax.dot_product_attention"
    versions = "qwix >=0.1.8, tokamax >=0.0.12"
    checked = "qwix 0.1.8, tokamax 0.0.12, 2026-11-22: run, see tests/golden/export"
    ran = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return {}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Codecs of the form above, one per layer and side."""
        allowed = (
            *(match(name) for name in NAMES),
            match("per_channel", form="symmetric"),
            match("ggml", type=GGML_TYPES),
            match("exact"),
        )
        return (Constraints(granularity="per_kv", k=allowed, v=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        from turboq.plan.document import fingerprint

        dtype = model_dtype(plan, options)
        held = {}
        for e in entries(plan, arrays):
            if e.rope != "after" and e.arrays:
                note = f"its arrays were fitted to keys {e.rope} RoPE"
                held[e.place] = exact_held(e, dtype, reduced=False, note=note)
            elif representable(e.codec):
                held[e.place] = Held(format="QArray", codec=e.codec, arrays=e.arrays)
            elif isinstance(e.codec, Exact):
                held[e.place] = Held(format=e.codec.dtype, codec=e.codec)
            else:
                note = f"a QArray cannot hold {WHY}"
                held[e.place] = exact_held(e, dtype, reduced=False, note=note)
        source = _SOURCE.format(model=plan.model.name, hash=fingerprint(plan))
        return Projection(
            held=held,
            files={FILE: source.encode()},
            flags=("tokamax.dot_product_attention(q, *turboq_qarrays.layer(0, keys, values))",),
            notes=(f"{EXTRA} has what the module imports.",),
        )
