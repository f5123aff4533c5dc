"""Honest bytes: what a stored token costs, and what a whole cache costs at a stated context.

Two numbers answer two questions. *Bytes per token* is the price of one more quantized token: codes
and scales of K and V, all heads, all layers. *Residency* is everything in memory at one context
length: whole pages, exact sinks and recent window, fitted arrays and static tables.
`buffers` lists exactly what `cache.contiguous.init` allocates, so live `nbytes` can be compared.

Examples:
  >>> from turboq import TokenPolicy, TurboQuantMSE, accounting, uniform_layer
  >>> codec = TurboQuantMSE(dim=128, bits=3)
  >>> policy = TokenPolicy(sinks=4)
  >>> layer = uniform_layer(kv_heads=8, k=codec, v=codec, policy=policy)
  >>> accounting.bits_per_channel([layer]), accounting.bits_per_token([layer]) // 8  # bytes
  (3.125, 800)
  >>> accounting.residency([layer], context=4096).compression > 4.5  # sinks and tables too
  True
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from turboq.cache import composed
from turboq.cache.layer import KVLayer
from turboq.cache.windows import pages_held
from turboq.codecs.base import Codec
from turboq.numbers.packing import PAGE, kept_shape

BASELINE_BITS = 16  # an exact bfloat16 cache

TableKey = tuple[str, tuple[int, ...], bytes]  # name, shape, float32 values
_ITEM_BYTES = {"uint32": 4, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """One allocated array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residency:
    """Bytes in memory for `batch` sequences of `context` tokens each.

    Every token that its layer keeps (of a sliding window: the last `window`) is stored quantized
    (`quantized`); sinks and the recent window are kept exact *besides*; `padding` is the rest of
    the pages.
    """

    context: int
    batch: int
    numbers: int  # of K and V in all layers that keep them: 2*K*D*L per token without windows
    quantized: int
    padding: int
    sinks: int
    recent: int
    arrays: int
    tables: int

    @property
    def cache(self) -> int:
        """Live buffers of all layers: the sum of `LayerCache.nbytes`."""
        return self.quantized + self.padding + self.sinks + self.recent

    @property
    def total(self) -> int:
        return self.cache + self.arrays + self.tables

    @property
    def baseline(self) -> int:
        """The same tokens in an exact bfloat16 cache without padding."""
        return self.numbers * BASELINE_BITS // 8

    @property
    def bits_per_channel(self) -> float:
        """All-in: every byte of `total` over every number kept."""
        return 8 * self.total / self.numbers

    @property
    def compression(self) -> float:
        """How many times smaller than the bfloat16 baseline."""
        return self.baseline / self.total


def bits_per_token(layers: Iterable[KVLayer]) -> int:
    """Stored bits of one more quantized token over all layers."""
    return sum(layer.bits_per_token for layer in layers)


def channels(layers: Iterable[KVLayer]) -> int:
    """Numbers that one token stores: sum over layers and KV heads of D_k + D_v."""
    return sum(len(g.heads) * (g.k.dim + g.v.dim) for layer in layers for g in layer.groups)


def bits_per_channel(layers: Sequence[KVLayer]) -> float:
    """Stored bits of one more token over its numbers.

    The limit of `Residency.bits_per_channel` for a long context: no sinks, windows or tables.
    """
    return bits_per_token(layers) / channels(layers)


def compression(layers: Sequence[KVLayer]) -> float:
    """bfloat16 bits over stored bits of one more token."""
    return BASELINE_BITS / bits_per_channel(layers)


def capacity(context: int) -> int:
    """Tokens of the whole pages that hold `context` tokens.

    Raises:
      ValueError: `context` is not positive.
    """
    if context < 1:
        raise ValueError(f"{context=} must be at least 1 token")
    return -(-context // PAGE) * PAGE


def buffers(layer: KVLayer, *, batch: int, context: int) -> dict[str, Buffer]:
    """Every buffer that `cache.contiguous.init(layer, batch=batch, capacity=context)` allocates.

    Names are "{group}.{k|v}.{field}", "{group}.{k|v}.sinks" and "{group}.{k|v}.recent".
    """
    if batch < 1:
        raise ValueError(f"{batch=} must be at least 1 sequence")
    out = dict[str, Buffer]()
    slots = pages_held(layer.window, capacity(context)) * PAGE
    for i, group in enumerate(layer.groups):
        lead = (batch, len(group.heads))
        for side, codec in (("k", group.k), ("v", group.v)):
            for name, buffer in _stored(codec, lead, slots).items():
                out[f"{i}.{side}.{name}"] = buffer
            for name, tokens in (("sinks", layer.policy.sinks), ("recent", layer.ring)):
                out[f"{i}.{side}.{name}"] = Buffer(
                    shape=(*lead, tokens, codec.dim), dtype=layer.policy.exact_dtype
                )
    return out


def _stored(codec: Codec, lead: tuple[int, int], tokens: int) -> dict[str, Buffer]:
    return {
        f.name: Buffer(shape=(*lead, tokens // PAGE, *kept_shape(f.bits, f.width)), dtype="uint32")
        if f.packed
        else Buffer(
            shape=(*lead, tokens // codec.block if f.per_block else tokens, f.width), dtype=f.dtype
        )
        for f in codec.fields
    }


def array_bytes(layers: Iterable[KVLayer]) -> int:
    """Fitted arrays (means, scales, codebooks), float32, and what joined heads hold."""
    layers = [composed.held_layer(layer) for layer in layers]
    joined = sum(composed.nbytes(layer) for layer in layers)
    own = sum(
        len(group.heads) * math.prod(shape)
        for layer in layers
        for group in layer.groups
        for codec in (group.k, group.v)
        for shape in codec.array_shapes.values()
    )
    return joined + 4 * own


def distinct_tables(codecs: Iterable[Codec]) -> list[tuple[str, np.ndarray]]:
    """(name, float32 values) of every static table, equal ones once, in order of appearance."""
    seen: dict[TableKey, tuple[str, np.ndarray]] = {}
    for codec in codecs:
        for name, values in codec.tables.items():
            seen.setdefault(table_key(name, values), (name, np.asarray(values, np.float32)))
    return list(seen.values())


def table_key(name: str, values: Float[np.ndarray, "*n"]) -> TableKey:
    """Two tables are the same when their names and their float32 values are."""
    values = np.ascontiguousarray(values, np.float32)
    return name, values.shape, values.tobytes()


def distinct_codecs(layers: Iterable[KVLayer]) -> list[Codec]:
    """Every codec in use, once, in order of first use (K before V)."""
    groups = (group for layer in layers for group in layer.groups)
    return list(dict.fromkeys(codec for group in groups for codec in (group.k, group.v)))


def table_bytes(layers: Iterable[KVLayer]) -> int:
    """Static tables (rotations, codebooks) of all layers in float32, each once."""
    codecs = distinct_codecs(composed.held_layer(layer) for layer in layers)
    return sum(values.nbytes for _, values in distinct_tables(codecs))


def residency(layers: Sequence[KVLayer], *, context: int, batch: int = 1) -> Residency:
    """Everything in memory for `batch` sequences of `context` tokens.

    Raises:
      ValueError: `context` or `batch` is not positive.
    """
    all_buffers = [
        (name.rpartition(".")[2], buffer)
        for layer in layers
        for name, buffer in buffers(layer, batch=batch, context=context).items()
    ]

    def kept(name: str) -> int:
        return sum(buffer.nbytes for which, buffer in all_buffers if which == name)

    stored = sum(b.nbytes for _, b in all_buffers) - kept("sinks") - kept("recent")
    tokens = [min(context, layer.window or context) for layer in layers]
    bits = sum(n * layer.bits_per_token for n, layer in zip(tokens, layers, strict=True))
    quantized = batch * bits // 8
    return Residency(
        context=context,
        batch=batch,
        numbers=batch * sum(n * channels([x]) for n, x in zip(tokens, layers, strict=True)),
        quantized=quantized,
        padding=stored - quantized,
        sinks=kept("sinks"),
        recent=kept("recent"),
        arrays=array_bytes(layers),
        tables=table_bytes(layers),
    )


def exact_bytes(
    heads: Iterable[tuple[int, int, int]], *, context: int, batch: int = 1, bits: int = 16
) -> int:
    """Bytes of an exact cache from geometry alone: (kv_heads, k_dim, v_dim) of every layer."""
    return context * batch * sum(k * (dk + dv) for k, dk, dv in heads) * bits // 8


def readable(nbytes: int | float) -> str:
    """1536 -> `1.5 KiB`."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
