"""optimum-quanto's affine integers, which KVTuner and transformers store, as codecs.

minimum = min, scale = (max - min) / (2^b - 1) of a group, both in the tensor's own type
axis 0    groups of consecutive channels of one token        int_affine, kivi_value
axis -1   groups of consecutive tokens of one channel        kivi_key
"""

from __future__ import annotations

from turboq.cache.layer import TokenPolicy
from turboq.codecs.int_affine import IntAffine
from turboq.codecs.kivi import GROUPS, KiviKey, KiviValue
from turboq.export.base import Side
from turboq.plan import ModelGeometry

BITS = (2, 4)
RESIDUAL = 128  # recent tokens kept exact, when the plan keeps none


def quanto_codec(
    side: Side, dim: int, bits: int, *, group: int, dtype: str, per_channel: bool = False
) -> KiviKey | KiviValue | IntAffine:
    """The codec of one side; `per_channel` groups tokens (K only)."""
    if side == "v":
        return KiviValue(dim=dim, bits=bits, group=group, scale_dtype=dtype)
    if per_channel:
        return KiviKey(dim=dim, bits=bits, group=group, scale_dtype=dtype)
    return IntAffine(dim=dim, bits=bits, group=group, scale_dtype=dtype, rotation="identity")


def groups_of(model: ModelGeometry) -> tuple[int, ...]:
    """Group sizes that divide every head dim."""
    dims = {dim for layer in model.cache_layers for dim in (layer.k_dim, layer.v_dim)}
    return tuple(g for g in GROUPS if all(dim % g == 0 for dim in dims))


def residual(wanted: TokenPolicy) -> TokenPolicy:
    """The recent tokens, at least one, that these caches keep."""
    recent = wanted.recent or RESIDUAL
    return TokenPolicy(sinks=0, recent=recent, exact_dtype=wanted.exact_dtype)
