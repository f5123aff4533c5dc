"""tpu-inference (vLLM on TPU): an attention backend whose cache is a plan's pages.

    TURBOQ_PLAN=runs/mine vllm serve MODEL --attention-backend turboq --block-size 64

`vllm_plugin` calls `register` with the layers of that plan, which must have been made with
--sinks=0 --recent=0. The engine keeps one array of one type and shape for each layer; ours holds,
for a page and a head, all bits of its tokens:

    [pages, page / 32, K, bits]     uint32, or as many of the engine's own narrower type

with `bits` those of the largest head of the plan, so plans of equal heads waste none. Attention
takes such an array apart and puts it together again, which copies a layer's pool in every step: the
engine donates one array where our kernels read one per field. Right, not fast.

Read: tpu-inference 0.32.0 (`layers/common/attention_backend.py`, `runner/kv_cache.py`,
`layers/vllm/backends/flash_attn.py`). Registration was run with that first file and vLLM's
registry, attention over a fake of the interface only: the line above, on a TPU, is not run. One
device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from turboq.cache.contiguous import GroupBuffers
from turboq.cache.layer import KVLayer, in_head_order
from turboq.cache.paged import PagedCache
from turboq.codecs.base import Codec
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE_ROWS, WORD_BITS
from turboq_kernels.engines import ragged

NAME = "turboq"
VLLM_BACKEND = f"{__name__}.PallasTurboq"  # made by `__getattr__`


def register(layers: Mapping[int, KVLayer]) -> None:
    """Makes `--attention-backend turboq` read these layers, by their index in the model.

    Raises:
      TurboqError: a layer that keeps exact tokens.
      ImportError: tpu-inference is not installed.
    """
    from tpu_inference.layers.common.attention_backend import (  # pyright: ignore
        register_attention_backend,
    )

    for index, layer in layers.items():
        try:
            ragged.check(layer)
        except ValueError as error:
            raise TurboqError(f"layer {index}: {error}") from None
    bits = max(map(most_bits, layers.values()))
    # The engine names a backend, not a layer, where it runs one: a name for each, and one for all.
    named: dict[str, KVLayer | None] = {f"{NAME}_{i}": layer for i, layer in layers.items()}
    for name, layer in (named | {NAME: None}).items():
        make = functools.partial(_backend(), layer, bits)
        register_attention_backend(name, attention=make, vllm_backend=VLLM_BACKEND)


def __getattr__(name: str) -> Any:
    """The class that vLLM takes by its path, made on the engine's own."""
    if name != "PallasTurboq":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tpu_inference.layers.vllm.backends import flash_attn  # pyright: ignore

    class Implementation(flash_attn.PallasAttentionBackendImpl):
        attention_backend = NAME

        def forward(self, layer: Any, *inputs: Any, **options: Any) -> Any:
            self.attention_backend = f"{NAME}_{layer_index(layer.layer_name)}"
            return super().forward(layer, *inputs, **options)

    class PallasTurboq(flash_attn.PallasAttentionBackend):
        @staticmethod
        def get_name() -> str:
            return NAME.upper()

        @staticmethod
        def get_impl_cls() -> type:
            return Implementation

    return globals().setdefault(name, PallasTurboq)


def layer_index(name: str) -> int:
    """7 of "model.layers.7.self_attn.attn".

    Raises:
      TurboqError: a name without a number.
    """
    for part in name.split("."):
        if part.isdecimal():
            return int(part)
    raise TurboqError(f"attention layer {name!r} has no number in its name")


@functools.cache
def _backend() -> type:
    """The kernel and the layout of the cache, on the engine's base class."""
    from tpu_inference.layers.common.attention_backend import AttentionBackend  # pyright: ignore

    class Backend(AttentionBackend):
        def __init__(self, layer: KVLayer | None, bits: int):
            self.layer, self.bits = layer, bits

        def get_kv_cache_shape(
            self, total_num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
            kv_dtype: Any,
        ) -> tuple[int, ...]:  # fmt: skip
            """One shard's.

            Raises:
              ValueError: pages that are not of 64 or 256 tokens.
            """
            if page_size not in PAGE_ROWS:
                raise ValueError(f"{page_size=} must be one of {tuple(PAGE_ROWS)}: --block-size")
            parts = WORD_BITS // (8 * jnp.dtype(kv_dtype).itemsize)
            return total_num_pages, PAGE_ROWS[page_size], num_kv_heads, self.bits * parts

        def attention(
            self, kv_cache: Array, q: Array, k: Array, v: Array, md: Any, shared_md: Any, mesh: Any,
            *, sm_scale: float, attention_chunk_size: int | None, q_scale: float | None,
            k_scale: float | None, v_scale: float | None, sinks: Array | None,
            update_kv_cache: bool, use_causal_mask: bool, attn_logits_soft_cap: float | None,
            head_dim_original: int, decode_query_size: int,
        ) -> tuple[Array, Array]:  # fmt: skip
            """(kv_cache, output).

            Raises:
              ValueError: several devices, scales of an FP8 cache, or attention that is not causal.
            """
            given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
            if any(x is not None for x in given.values()):
                raise ValueError(f"{given}: leave --kv-cache-dtype at auto, codecs have own scales")
            if mesh.size != 1 or not use_causal_mask:
                raise ValueError(f"{mesh.size=} and {use_causal_mask=} must be 1 and True")
            assert self.layer is not None  # NAME itself only says the shape
            pages = from_array(self.layer, kv_cache, sequences=shared_md.seq_lens.shape[0])
            out, pages = ragged.attend(
                q, k, v, self.layer, pages,
                lengths=shared_md.seq_lens,
                table=md.block_tables.reshape(shared_md.seq_lens.shape[0], -1),
                query_starts=shared_md.query_start_loc,
                sequences=shared_md.request_distribution[2], scale=sm_scale,
                window=attention_chunk_size, softcap=attn_logits_soft_cap, sink_logits=sinks,
                store=update_kv_cache,
            )  # fmt: skip
            return to_array(self.layer, pages, kv_cache), out

    return Backend


def most_bits(layer: KVLayer) -> int:
    """Stored bits of one token of the largest head, K and V."""
    return max(g.k.bits_per_vector + g.v.bits_per_vector for g in layer.groups)


def to_array(layer: KVLayer, cache: PagedCache, like: Array) -> Array:
    """The fields of a pool as one array of `like`'s shape and type."""
    pages, rows, heads, _ = like.shape
    found = []
    for group, buffers in zip(layer.groups, cache.groups, strict=True):
        fields = [
            _words(stored[field.name])
            for codec, stored in ((group.k, buffers.k), (group.v, buffers.v))
            for field in codec.fields
        ]
        found.append(jnp.concatenate(fields, axis=-1))
    most = rows * like.shape[3] * like.dtype.itemsize * 8 // WORD_BITS
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, most - x.shape[-1]))) for x in found]
    words = in_head_order(layer, jnp.concatenate(padded, axis=1), 1)
    words = words.reshape(pages, heads, rows, -1).swapaxes(1, 2)
    return jax.lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)


def from_array(layer: KVLayer, array: Array, *, sequences: int) -> PagedCache:
    """The pool that `to_array` has put together."""
    pages, rows, heads, _ = array.shape
    parts = WORD_BITS // (8 * array.dtype.itemsize)
    shape = (pages, rows, heads, -1, parts) if parts > 1 else (pages, rows, heads, -1)
    words = jax.lax.bitcast_convert_type(array.reshape(shape), jnp.uint32)
    words = words.swapaxes(1, 2).reshape(pages, heads, -1)
    empty = jax.eval_shape(
        lambda: ragged.pages(layer, count=pages, sequences=sequences, page=rows * WORD_BITS)
    )

    def side(codec: Codec, mine: UInt32[Array, "pages N W"], due: Any, at: int) -> tuple[Any, int]:
        found = {}
        for field in codec.fields:
            like = due[field.name]
            size = like.size // like.shape[0] // like.shape[1] * like.dtype.itemsize // 4
            found[field.name] = _like(mine[..., at : at + size], like)
            at += size
        return found, at

    groups = []
    for group, due in zip(layer.groups, empty.groups, strict=True):
        mine = words[:, jnp.array(group.heads)]
        k, at = side(group.k, mine, due.k, 0)
        v, _ = side(group.v, mine, due.v, at)
        none = [jnp.zeros(x.shape, x.dtype) for x in (due.k_sinks, due.v_sinks)]
        groups.append(GroupBuffers(k=k, v=v, k_sinks=none[0], v_sinks=none[1],
                                   k_recent=none[0], v_recent=none[1]))  # fmt: skip
    overflow = jnp.zeros((sequences,), jnp.int32)
    return PagedCache(groups=tuple(groups), overflow=overflow, page=rows * WORD_BITS)


def _words(x: Array) -> UInt32[Array, "pages N W"]:
    """A field's buffer as words, whatever its type."""
    flat = x.reshape(*x.shape[:2], -1)
    parts = 4 // x.dtype.itemsize
    if parts > 1:
        flat = flat.reshape(*flat.shape[:2], -1, parts)
    return jax.lax.bitcast_convert_type(flat, jnp.uint32)


def _like(words: UInt32[Array, "pages N W"], like: Any) -> Array:
    return jax.lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)
