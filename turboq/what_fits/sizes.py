"""Bytes of a cache at a context, in two views that are kept apart.

`Formula` is the engine-neutral view: every layer's stored bits per token times the tokens it keeps,

    bytes = sum over layers of bits_per_token * min(context, window + slack) / 8

exact for any context and page. `Ours` is what `cache.contiguous` holds: whole pages of 256 tokens
(of a sliding window its own and one more), exact sinks and recent window besides. `Formula` at
`page_tokens=256` and `Ours` agree where there are no exact tokens and no windows; `differences`
says what the rest is made of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from turboq.what_fits.formats import HeadBits
from turboq.what_fits.layers import CacheGeometry, CacheLayer

if TYPE_CHECKING:
    from turboq.cache.layer import KVLayer
    from turboq.plan import ModelGeometry, Plan

OUR_PAGE = 256  # turboq.numbers.packing.PAGE, which would import jax


@runtime_checkable
class Cache(Protocol):
    """What the budget asks of either view."""

    @property
    def page_tokens(self) -> int: ...

    @property
    def fixed_bytes(self) -> int:
        """Held once, whatever the context (fitted arrays, tables)."""
        ...

    def kv_bytes(self, context: int, batch: int = 1, prefix: int = 0) -> int:
        """Cache of `batch` sequences of `context` tokens whose first `prefix` tokens are shared."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Stored bits of one token in one layer, and how many tokens it keeps (None: all)."""

    kind: str
    bits: int
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formula:
    """The engine-neutral view. `window_slack`: tokens an engine keeps beyond a window.

    Raises:
      ValueError: page or slack out of range.
    """

    layers: tuple[LayerSize, ...]
    page_tokens: int = 1
    window_slack: int = 0
    fixed_bytes: int = 0

    def __post_init__(self):
        if self.page_tokens < 1 or self.window_slack < 0:
            raise ValueError(
                f"{self.page_tokens=} must be 1 or more, {self.window_slack=} 0 or more"
            )

    @property
    def bits_per_token(self) -> int:
        """Of a token that every layer keeps."""
        return sum(layer.bits for layer in self.layers)

    @property
    def growing_bits(self) -> int:
        """Of one more token once all windows are full."""
        return sum(layer.bits for layer in self.layers if layer.window is None)

    @functools.cached_property
    def _alike(self) -> tuple[LayerSize, ...]:
        """Layers of equal windows as one: bisection asks for sizes thousands of times."""
        bits: dict[int | None, int] = {}
        for layer in self.layers:
            bits[layer.window] = bits.get(layer.window, 0) + layer.bits
        return tuple(LayerSize(kind="any", bits=b, window=w) for w, b in bits.items() if b)

    def kept(self, layer: LayerSize, context: int) -> int:
        """Tokens of a sequence that `layer` keeps."""
        return context if layer.window is None else min(context, layer.window + self.window_slack)

    def kv_bytes(self, context: int, batch: int = 1, prefix: int = 0) -> int:
        page, bits = self.page_tokens, 0
        for layer in self._alike:
            kept = self.kept(layer, context)
            # Of the shared prefix only whole pages are shared, and only what is still kept.
            shared = 0 if batch == 1 else max(0, min(prefix, context) - (context - kept))
            shared -= shared % page
            bits += layer.bits * (shared + batch * -(-(kept - shared) // page) * page)
        return -(-bits // 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """What `cache.contiguous` allocates for a plan's layers, from `cache.accounting`."""

    page_bytes: int  # of the layers without a window
    exact_bytes: int  # sinks and recent window of one sequence
    fixed_bytes: int  # fitted arrays and static tables
    page_tokens: int = OUR_PAGE
    windowed: tuple[tuple[int, int], ...] = ()  # (window, bytes of a page of its layers)

    @classmethod
    def of(cls, layers: Sequence[KVLayer]) -> Ours:
        from turboq.cache import accounting

        at = accounting.residency(layers, context=OUR_PAGE)
        pages: dict[int | None, int] = {None: 0}
        for layer in layers:
            pages.setdefault(layer.window, 0)
            pages[layer.window] += OUR_PAGE * layer.bits_per_token // 8
        return cls(
            page_bytes=pages.pop(None),
            exact_bytes=at.sinks + at.recent,
            fixed_bytes=at.arrays + at.tables,
            windowed=tuple((window, n) for window, n in pages.items() if window is not None),
        )

    def kv_bytes(self, context: int, batch: int = 1, prefix: int = 0) -> int:
        total = batch * self.exact_bytes
        for window, nbytes in ((None, self.page_bytes), *self.windowed):
            pages, held = _pages(None, context), _pages(window, context)
            # Of the shared prefix only whole pages are shared, and only what is still held.
            whole = 0 if batch == 1 else min(prefix, context) // OUR_PAGE
            shared = max(0, whole - (pages - held))
            total += (shared + batch * (held - shared)) * nbytes
        return total


def _pages(window: int | None, tokens: int) -> int:
    """`turboq.cache.windows.pages_held`, which would import jax; a test holds them together."""
    pages = -(-tokens // OUR_PAGE)
    return pages if window is None else min(pages, -(-(window - 1) // OUR_PAGE) + 1)


def formula(
    geometry: CacheGeometry,
    head_bits: HeadBits,
    *,
    page_tokens: int = 1,
    window_slack: int = 0,
    edge: int = 0,
    index_bits: Callable[[int], int] | None = None,
) -> Formula:
    """The engine-neutral view of a model whose heads are all stored by one rule.

    `edge`: so many first and last layers with a cache are kept in 16 bits. `index_bits` of an
    index key's dim (sparse attention); by default as a key's.

    Raises:
      TurboqError: the rule does not fit a head's dims.
    """
    stored = [index for index, layer in enumerate(geometry.layers) if layer.stores]
    plain = {*stored[:edge], *stored[len(stored) - edge :]}
    sizes = []
    for index, layer in enumerate(geometry.layers):
        bits = 0
        if index in plain:
            bits = 16 * layer.kv_heads * (layer.k_dim + layer.v_dim)
        elif layer.stores:
            bits = layer.kv_heads * head_bits(layer.k_dim, layer.v_dim)
        if layer.index_dim:
            dim = layer.index_dim
            bits += index_bits(dim) if index_bits else head_bits(dim, 0)
        sizes.append(LayerSize(kind=layer.kind, bits=bits, window=layer.window))
    return Formula(layers=tuple(sizes), page_tokens=page_tokens, window_slack=window_slack)


def plan_geometry(model: ModelGeometry) -> CacheGeometry:
    """The cache geometry of a plan's model."""
    layers = []
    for layer in model.layers:
        if layer.borrows_cache_of is not None or layer.kv_heads == 0:
            layers.append(CacheLayer(kind="shared" if layer.kv_heads else "none"))
            continue
        if layer.latent:
            layers.append(CacheLayer(kind="latent", kv_heads=1, k_dim=layer.k_dim + layer.v_dim))
            continue
        layers.append(
            CacheLayer(
                kind="full" if layer.window is None else "sliding",
                kv_heads=layer.kv_heads,
                k_dim=layer.k_dim,
                v_dim=layer.v_dim,
                window=layer.window,
            )
        )
    return CacheGeometry(name=model.name, family=model.family, layers=tuple(layers))


def plan_formula(plan: Plan, *, page_tokens: int = 1, window_slack: int = 0) -> Formula:
    """The engine-neutral view of a plan, its windows included."""
    bits = dict(zip((x.index for x in plan.layers), plan.bytes.layer_bits_per_token, strict=True))
    sizes = tuple(
        LayerSize(kind=layer.kind, bits=bits.get(index, 0), window=layer.window)
        for index, layer in enumerate(plan_geometry(plan.model).layers)
    )
    return Formula(layers=sizes, page_tokens=page_tokens, window_slack=window_slack)


def baseline(layers: Iterable[CacheLayer], context: int) -> int:
    """Bytes of one sequence in 16 bits by the formula, windows counted."""
    return sum(
        (layer.kv_heads * (layer.k_dim + layer.v_dim) + layer.index_dim)
        * 2
        * min(context, layer.window or context)
        for layer in layers
    )


def differences(engine: Formula, ours: Ours, *, context: int, batch: int = 1) -> dict[str, int]:
    """Why `ours` is larger than `engine` at page 1: bytes by reason, summing to the difference."""
    neutral = dataclasses.replace(engine, page_tokens=1, window_slack=0).kv_bytes(context, batch)
    exact = batch * ours.exact_bytes
    return {
        "rest of pages of 256 tokens": ours.kv_bytes(context, batch) - exact - neutral,
        "exact sinks and recent window": exact,
    }
