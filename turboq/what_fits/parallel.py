"""One rank of a model whose attention heads are divided over devices (tensor parallelism).

What has no heads to divide lies on every rank: latent vectors of MLA, and index keys of sparse
attention. So do KV heads where there are fewer of them than ranks.
"""

from __future__ import annotations

import dataclasses
import math

from turboq.errors import TurboqError
from turboq.what_fits.layers import MAX_HEADS, CacheGeometry, CacheLayer


def rank(geometry: CacheGeometry, ranks: int) -> CacheGeometry:
    """What the fullest of `ranks` keeps: ceil(heads / ranks) KV heads; so with states and weights.

    Raises:
      TurboqError: ranks below 1 or beyond any model's heads.
    """
    if not 1 <= ranks <= MAX_HEADS:
        raise TurboqError(f"--tensor_parallel={ranks} must be 1..{MAX_HEADS} ranks")
    if ranks == 1:
        return geometry
    layers = tuple(_layer(layer, ranks) for layer in geometry.layers)
    said = [f"one of {ranks} ranks is counted, with a 1/{ranks} share of weights and states"]
    if any(layer.kind == "latent" for layer in layers):
        said.append("latent vectors lie on every rank")
    if any(layer.index_dim for layer in layers):
        said.append("index keys lie on every rank")
    heads = {x.kv_heads for x in geometry.layers if x.stores and x.kind != "latent"}
    if uneven := sorted(n for n in heads if n % ranks):
        said.append(f"{', '.join(map(str, uneven))} KV heads do not divide: the fullest rank")
    weights = geometry.weights_bytes
    return dataclasses.replace(
        geometry,
        layers=layers,
        weights_bytes=None if weights is None else -(-weights // ranks),
        note="; ".join([*([geometry.note] if geometry.note else []), *said]),
    )


def _layer(layer: CacheLayer, ranks: int) -> CacheLayer:
    state = layer.state_bytes
    return dataclasses.replace(
        layer,
        kv_heads=layer.kv_heads if layer.kind == "latent" else math.ceil(layer.kv_heads / ranks),
        state_bytes=None if state is None else math.ceil(state / ranks),
    )
