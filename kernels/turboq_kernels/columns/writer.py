"""Tokens into the one pool, encoded by a kernel or by XLA.

state, words, tail = write(state, words, k, v)           as `turboq.cache.model_cache.write`
"""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import model_cache
from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerForm, LayerState
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.transform_padded import PaddedTransform, rows_of
from turboq_kernels.columns import mosaic_tpu_append, triton_append
from turboq_kernels.encode import mosaic_tpu_window, triton_window

WRITERS = ("xla", "mosaic_tpu", "triton")
_PREFERENCE = {"gpu": ("triton",), "tpu": ("mosaic_tpu",)}
_SEARCH = {"triton": triton_window, "mosaic_tpu": mosaic_tpu_window}


def unsupported(form: LayerForm, name: str) -> str | None:
    """Why an implementation cannot write a layer, or None."""
    if name == "xla":
        return None
    for codec in form.codecs:
        if codec.quantizer != "window":
            return f"{codec.quantizer} codes; window codes are searched"
        reason = _SEARCH[name].unsupported(codec.dim)
        if reason is not None:
            return reason
    return None


def write(
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[LayerState, UInt32[Array, "N P R C"], Tail]:
    """`turboq.cache.model_cache.write`, by the implementation named; None: the platform's kernel.

    Codes of a kernel and of XLA leave the same weighted error up to float32's rounding
    (`turboq_kernels.encode.triton_window`).

    Raises:
      ValueError: unknown, or named and not able to; the message says why. As the function above.
    """
    name = choose(state.form, implementation)
    if name == "xla":
        return model_cache.write(state, words, k, v, counts)
    if name == "triton":
        appends = triton_append.unsupported(state.form, k.shape[1]) is None
    else:
        appends = mosaic_tpu_append.unsupported(state, words, k.shape[1]) is None
    return model_cache.write(state, words, k, v, counts, _by_kernel(name, interpret, appends))


def choose(form: LayerForm, implementation: str | None) -> str:
    """The implementation that `write` takes.

    Raises:
      ValueError: unknown, or named and not able to.
    """
    if implementation is None:
        order = (*_PREFERENCE.get(jax.default_backend(), ()), "xla")
        return next(name for name in order if unsupported(form, name) is None)
    if implementation not in WRITERS:
        raise ValueError(f"{implementation=} must be None or one of {WRITERS} to write")
    reason = unsupported(form, implementation)
    if reason is not None:
        raise ValueError(f"{implementation=} cannot write this case: {reason}; use 'xla' or None")
    return implementation


# Cached, so that one setting is one function: `model_cache.write` compiles once for each.
@functools.cache
def _by_kernel(name: str, interpret: bool, appends: bool) -> model_cache.Put:
    """One token in one launch, or codes by the kernel and the rest by XLA."""
    if appends:
        own = triton_append if name == "triton" else mosaic_tpu_append
        return functools.partial(own.append, interpret=interpret)

    def encode(codec: Codec, arrays: Arrays, stored: Stored, x, positions, valid) -> Stored:
        assert isinstance(codec, PaddedTransform)  # of every `LayerForm`
        y = jax.vmap(codec.analyse, in_axes=(0, 1), out_axes=1)(arrays, x)
        search = functools.partial(_SEARCH[name].encode, rows_of(arrays), interpret=interpret)
        if codec.gain == "code":
            codes, gain = search(y, arrays["gains"], arrays["weights"])
            return {"codes": codes, "gain": gain[..., None]}
        u, stored = _units(codec, arrays, y)
        codes, _ = search(u, None, arrays["weights"])
        return stored | {"codes": codes}

    return functools.partial(model_cache.put, encode=encode)


def _units(codec: PaddedTransform, arrays: Arrays, y: Float[Array, "B K T D"]):
    """`PaddedTransform.unit` of all heads."""

    def one(arrays: Arrays, y: Float[Array, "B T D"]):
        u, stored = codec.unit(arrays, y.reshape(-1, codec.dim))
        lead = y.shape[:-1]
        return u.reshape(y.shape), {n: a.reshape(*lead, -1) for n, a in stored.items()}

    return jax.vmap(one, in_axes=(0, 1), out_axes=1)(arrays, y)
