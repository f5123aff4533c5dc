"""What a layer caches, read twice: by the decoder's reader and by the planner's, which must agree.

The planner refuses every field that may change a cache and that it does not know; so the decoder
does too.
"""

# pyright: strict

from __future__ import annotations

from collections.abc import Callable

from turboq.errors import TurboqError
from turboq.what_fits import CacheGeometry, CacheLayer
from turboq.what_fits.hf_fields import BY_HAND
from turboq_calibrate.models.spec import LayerSpec, ModelSpec


def check(spec: ModelSpec, planner: Callable[[], CacheGeometry]) -> ModelSpec:
    """`spec`, if the planner reads the same cache from the same file.

    Raises:
      TurboqError: the planner refuses a field, or reads other KV heads, dims or windows.
    """
    try:
        found = planner().layers
    except TurboqError as error:
        raise TurboqError(str(error).removesuffix(f": {BY_HAND}")) from None
    if len(found) != len(spec.layers):
        raise TurboqError(f"{spec.name}: {len(spec.layers)} layers, but {len(found)} with a cache")
    for index, (layer, other) in enumerate(zip(spec.layers, found, strict=True)):
        ours, theirs = _of_spec(layer), _of_planner(other)
        if ours != theirs:
            raise TurboqError(
                f"{spec.name}: layer {index} of {spec.family} would be run with {_words(*ours)} but"
                f" its file says {_words(*theirs)}: this is not supported"
            )
    return spec


def _of_spec(layer: LayerSpec) -> tuple[int, int, int, int | None]:
    """KV heads, dims of K and V (of a latent vector: all of it, and 0), window."""
    if not layer.owns_cache:
        return 0, 0, 0, None
    if layer.latent is not None:
        return 1, layer.head_dim + layer.v_head_dim, 0, layer.window
    return layer.kv_heads, layer.head_dim, layer.v_head_dim, layer.window


def _of_planner(layer: CacheLayer) -> tuple[int, int, int, int | None]:
    return layer.kv_heads, layer.k_dim, layer.v_dim + layer.index_dim, layer.window


def _words(heads: int, k: int, v: int, window: int | None) -> str:
    what = f"{heads} KV heads, K {k} and V {v} wide" if heads else "no KV cache"
    return what if window is None else f"{what}, window {window}"
