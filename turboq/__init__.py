"""turboq: learned per-head KV-cache quantization.

The names that most programs need, loaded when first used (`turboq memory` never loads JAX):

    TurboQuantMSE(dim=128, bits=3), PerHead, Transform, ...   codecs (`turboq.codecs` has them all)
    Plan, load, save, summary, uniform_plan                    how a model's K and V are stored
    TokenPolicy(sinks=4)                                       which tokens stay exact
    KVLayer, uniform_layer, contiguous                         packed caches of a layer
    Pool, ModelPool                                            pages that sequences share
    accounting, max_context                                    bytes; what fits a memory
    ENGINES, export_plan                                       plans for other engines
    packing, rotation, codebook                                the numbers underneath

Attention over such a cache is `turboq_kernels.cache_attention`. Shapes are in the letters of
`docs/reference/index.md`.
"""

# pyright: strict

from typing import TYPE_CHECKING, Any

from turboq.version import __version__ as __version__

_FROM = {
    "turboq.codecs": ("CODECS", "Codec", "Exact", "PerHead", "Transform", "TurboQuantMSE"),
    "turboq.plan": (
        "LayerGeometry", "ModelGeometry", "Plan", "head_plan", "load", "save", "summary",
        "uniform_plan",
    ),
    "turboq.cache": ("accounting", "contiguous"),
    "turboq.export": ("ENGINES", "export_plan"),
    "turboq.cache.layer": ("KVLayer", "TokenPolicy", "uniform_layer"),
    "turboq.cache.model_pool": ("ModelPool",),
    "turboq.cache.pool": ("Pool",),
    "turboq.what_fits.max_context": ("max_context",),
    "turboq.errors": ("TurboqError",),
    "turboq.numbers": ("codebook", "packing", "rotation"),
}  # fmt: skip
_NAMES = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted([*_NAMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from turboq.cache import accounting as accounting
    from turboq.cache import contiguous as contiguous
    from turboq.cache.layer import KVLayer as KVLayer
    from turboq.cache.layer import TokenPolicy as TokenPolicy
    from turboq.cache.layer import uniform_layer as uniform_layer
    from turboq.cache.model_pool import ModelPool as ModelPool
    from turboq.cache.pool import Pool as Pool
    from turboq.codecs import CODECS as CODECS
    from turboq.codecs import Codec as Codec
    from turboq.codecs import Exact as Exact
    from turboq.codecs import PerHead as PerHead
    from turboq.codecs import Transform as Transform
    from turboq.codecs import TurboQuantMSE as TurboQuantMSE
    from turboq.errors import TurboqError as TurboqError
    from turboq.export import ENGINES as ENGINES
    from turboq.export import export_plan as export_plan
    from turboq.numbers import codebook as codebook
    from turboq.numbers import packing as packing
    from turboq.numbers import rotation as rotation
    from turboq.plan import LayerGeometry as LayerGeometry
    from turboq.plan import ModelGeometry as ModelGeometry
    from turboq.plan import Plan as Plan
    from turboq.plan import head_plan as head_plan
    from turboq.plan import load as load
    from turboq.plan import save as save
    from turboq.plan import summary as summary
    from turboq.plan import uniform_plan as uniform_plan
    from turboq.what_fits.max_context import max_context as max_context


def __getattr__(name: str) -> Any:
    from turboq.lazy import find

    return find(__name__, _NAMES, name)


def __dir__() -> list[str]:
    return __all__
