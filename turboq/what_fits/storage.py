"""A way of storing the cache, in both views: an engine's format, a turboq codec, or a plan.

Only turboq codecs and plans import jax, and only when one is named.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from turboq.errors import TurboqError
from turboq.what_fits.formats import EDGE, FORMATS, head_bits, known, plain_name
from turboq.what_fits.layers import CacheGeometry
from turboq.what_fits.sizes import Cache, Formula, Ours, formula, plan_formula

if TYPE_CHECKING:
    from turboq.cache.layer import KVLayer, TokenPolicy
    from turboq.codecs.base import Codec
    from turboq.plan import Plan
    from turboq.words import Side

View = Literal["engine", "ours"]
CodecAt = Callable[[str, int], "Codec"]  # (side "k" or "v", dim) -> codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """One way of storing a model's cache. `layers` makes what cache.contiguous would hold."""

    name: str
    engine: Formula
    layers: Callable[[], tuple[KVLayer, ...]]

    @functools.cached_property
    def ours(self) -> Ours:
        """What `turboq.cache.contiguous` holds.

        Raises:
          TurboqError: turboq has no such cache.
        """
        return Ours.of(self.layers())

    def cache(self, view: View) -> Cache:
        return self.engine if view == "engine" else self.ours


def of_plan(plan: Plan, name: str, *, page_tokens: int = 1, window_slack: int = 0) -> Storage:
    """A plan's storage."""
    engine = plan_formula(plan, page_tokens=page_tokens, window_slack=window_slack)
    return Storage(name=name, engine=engine, layers=lambda: plan.storage)


def of_sides(
    geometry: CacheGeometry,
    k: Side,
    v: Side,
    policy: TokenPolicy | None = None,
    *,
    page_tokens: int = 1,
    window_slack: int = 0,
) -> Storage:
    """Keys and values as `turboq.words` names them: formats of engines, or turboq codecs.

    Raises:
      TurboqError: a format or codec that does not fit the heads.
    """
    sizes = {"page_tokens": page_tokens, "window_slack": window_slack}
    at: CodecAt = lambda side, dim: (k if side == "k" else v).codec(side, dim)  # noqa: E731
    formats = [_format(x) for x in (k, v)]
    if formats[0] is not None and formats[1] is not None:
        return _of_formats(geometry, formats[0], formats[1], at, policy, **sizes)
    return of_codecs(geometry, at, policy, **sizes)


def _format(side: Side) -> str | None:
    """The engine's format; the codec `exact` is also what every engine has."""
    if side.name == "exact":
        return plain_name(dict(side.settings).get("dtype", "bfloat16"))
    return side.format


def _of_formats(
    geometry: CacheGeometry,
    k: str,
    v: str,
    at: CodecAt,
    policy: TokenPolicy | None,
    *,
    page_tokens: int,
    window_slack: int,
) -> Storage:
    hybrid = any(layer.kind == "none" or layer.state_bytes != 0 for layer in geometry.layers)
    engine = formula(
        geometry,
        head_bits(k, v),
        page_tokens=page_tokens,
        window_slack=window_slack,
        edge=EDGE if FORMATS[k].slot and not hybrid else 0,
    )
    return Storage(
        name=k if k == v else f"{k}/{v}",
        engine=engine,
        layers=lambda: kv_layers(geometry, at, policy),
    )


def of_formats(geometry: CacheGeometry, k: str, v: str, **options: Any) -> Storage:
    """`of_sides` of two names of `turboq.what_fits.formats`.

    Raises:
      TurboqError: unknown format, or one that does not fit the heads.
    """
    from turboq.words import Side

    return of_sides(geometry, Side(known(k)), Side(known(v)), **options)


def of_codecs(
    geometry: CacheGeometry,
    at: CodecAt,
    policy: TokenPolicy | None = None,
    *,
    page_tokens: int = 1,
    window_slack: int = 0,
) -> Storage:
    """turboq codecs, `at(side, dim)` for each head dim.

    Raises:
      TurboqError: a codec does not exist at a head's dim.
    """
    from turboq.plan.summary import codec_label

    first = next(layer for layer in geometry.layers if layer.stores)

    def bits(k_dim: int, v_dim: int) -> int:
        return at("k", k_dim).bits_per_vector + (at("v", v_dim).bits_per_vector if v_dim else 0)

    engine = formula(
        geometry, bits, page_tokens=page_tokens, window_slack=window_slack,
        index_bits=lambda dim: 16 * dim,  # index keys are no head's vectors: left exact
    )  # fmt: skip
    sides = [codec_label(at("k", first.k_dim))]
    if first.v_dim and (v := codec_label(at("v", first.v_dim))) != sides[0]:
        sides.append(v)
    return Storage(
        name="/".join(sides), engine=engine, layers=lambda: kv_layers(geometry, at, policy)
    )


def option(
    text: str,
    geometry: CacheGeometry,
    policy: TokenPolicy | None = None,
    *,
    page_tokens: int = 1,
    window_slack: int = 0,
) -> Storage:
    """What one item of a list of choices means: a word of `turboq.words`, or a plan: [NAME=]FOLDER.

    Raises:
      TurboqError: it is neither, or does not fit the model.
    """
    from turboq import words

    kwargs = {"page_tokens": page_tokens, "window_slack": window_slack}
    label, what = words.labelled(text)
    if words.is_path(what):
        from turboq.plan import load

        plan, _ = load(what)
        check_plan(plan, geometry)
        return of_plan(plan, label or words.folder_name(what), **kwargs)
    word = words.parse(text)
    found = of_sides(geometry, word.k, word.v, policy, **kwargs)
    return dataclasses.replace(found, name=word.label)


def check_plan(plan: Plan, geometry: CacheGeometry) -> None:
    """Raises TurboqError unless the plan's layers keep what the model's layers keep."""
    theirs = [
        (1, x.k_dim + x.v_dim, 0) if x.latent else (x.kv_heads, x.k_dim, x.v_dim)
        for x in plan.model.layers
        if x.owns_cache
    ]
    own = [(x.kv_heads, x.k_dim, x.v_dim) for x in geometry.layers if x.stores]
    if theirs != own:
        raise TurboqError(
            f"the plan is for {plan.model.name} ({len(theirs)} layers with a cache), which is not "
            f"shaped as {geometry.name} ({len(own)} layers with a cache)"
        )


def kv_layers(
    geometry: CacheGeometry, at: CodecAt, policy: TokenPolicy | None = None
) -> tuple[KVLayer, ...]:
    """Layers of `turboq.cache.contiguous` for every layer that keeps K and V.

    Raises:
      TurboqError: the model keeps latent vectors or index keys, which turboq.cache.contiguous
        does not store.
    """
    from turboq.cache.layer import TokenPolicy, uniform_layer

    if any(layer.kind == "latent" for layer in geometry.layers):
        raise TurboqError(
            f"{geometry.name} caches one latent vector per token, which turboq's own cache does "
            "not store: leave out --view=ours, --sinks and --recent"
        )
    if any(layer.index_dim for layer in geometry.layers):
        raise TurboqError(
            f"{geometry.name} caches index keys of sparse attention, which turboq's own cache does "
            "not store: leave out --view=ours, --sinks and --recent"
        )
    policy = policy or TokenPolicy()
    made: dict[tuple[int, int, int, int | None], KVLayer] = {}
    for layer in geometry.layers:
        shape = (layer.kv_heads, layer.k_dim, layer.v_dim, layer.window)
        if layer.stores and shape not in made:
            k, v = at("k", layer.k_dim), at("v", layer.v_dim)
            made[shape] = uniform_layer(
                kv_heads=layer.kv_heads, k=k, v=v, policy=policy, window=layer.window
            )
    return tuple(made[x.kv_heads, x.k_dim, x.v_dim, x.window] for x in geometry.layers if x.stores)
