"""A way of storing the cache, in both views: an engine's format, a turboq codec, or a plan.

Only turboq codecs and plans import jax, and only when one is named.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from turboq.errors import TurboqError
from turboq.what_fits.formats import EDGE, FORMATS, head_bits, known, plain_name
from turboq.what_fits.layers import CacheGeometry
from turboq.what_fits.sizes import Cache, Formula, Ours, formula, plan_formula

if TYPE_CHECKING:
    from turboq.cache.layer import KVLayer, TokenPolicy
    from turboq.codecs.base import Codec
    from turboq.plan import Plan

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


def of_formats(
    geometry: CacheGeometry,
    k: str,
    v: str,
    policy: TokenPolicy | None = None,
    *,
    page_tokens: int = 1,
    window_slack: int = 0,
) -> Storage:
    """Keys and values in formats of `turboq.what_fits.formats`.

    Raises:
      TurboqError: unknown format, or one that does not fit the heads.
    """
    k, v = known(k), known(v)
    hybrid = any(layer.kind == "none" or layer.state_bytes != 0 for layer in geometry.layers)
    engine = formula(
        geometry,
        head_bits(k, v),
        page_tokens=page_tokens,
        window_slack=window_slack,
        edge=EDGE if FORMATS[k].slot and not hybrid else 0,
    )

    def at(side: str, dim: int) -> Codec:
        return _twin(k if side == "k" else v, dim)

    return Storage(
        name=k if k == v else f"{k}/{v}",
        engine=engine,
        layers=lambda: kv_layers(geometry, at, policy),
    )


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
    """What one item of a list of choices means: [NAME=]FORMAT[/V_FORMAT], CODEC[:BITS] or a plan.

    Raises:
      TurboqError: it is none of these, or does not fit the model.
    """
    label, equals, what = text.partition("=")
    what = what if equals else text
    kwargs = {"page_tokens": page_tokens, "window_slack": window_slack}
    k, _, v = what.partition("/")
    if plain_name(k) is not None and (not v or plain_name(v) is not None):
        found = of_formats(geometry, k, v or k, policy, **kwargs)
    elif (match := re.fullmatch(r"([a-z0-9_]+)(?::([1-8]))?", what)) and _is_codec(match[1]):
        found = of_codecs(geometry, _codec_at(match[1], match[2]), policy, **kwargs)
    elif Path(what).exists():
        from turboq.plan import load

        plan, _ = load(what)
        check_plan(plan, geometry)
        found = of_plan(plan, plan.model.name, **kwargs)
    else:
        raise TurboqError(
            f"{text!r} is no format, no CODEC[:BITS] and no plan folder "
            "(such as f16, q8_0/q4_0, turboquant_mse:3, mine=runs/mine)"
        )
    return dataclasses.replace(found, name=label) if equals and label else found


def check_plan(plan: Plan, geometry: CacheGeometry) -> None:
    """Raises TurboqError unless the plan's layers keep what the model's layers keep."""
    theirs = [(x.kv_heads, x.k_dim, x.v_dim) for x in plan.model.layers if x.owns_cache]
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


def _twin(name: str, dim: int) -> Codec:
    """The turboq codec that stores what an engine's format stores."""
    from turboq.codecs import from_config

    exact = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    if name in exact:
        return from_config({"codec": "exact", "dim": dim, "dtype": exact[name]})
    if name[0] in "qi" and not name.startswith("int"):
        return from_config({"codec": "ggml", "dim": dim, "type": name})
    raise TurboqError(f"turboq's own cache has no codec for {name}: use --view=engine")


def _is_codec(name: str) -> bool:
    from turboq.codecs import CODECS

    return name in CODECS


def _codec_at(name: str, bits: str | None) -> CodecAt:
    from turboq.codecs import from_config

    chosen = {} if bits is None else {"bits": int(bits)}
    return lambda side, dim: from_config({"codec": name, "dim": dim, **chosen})
