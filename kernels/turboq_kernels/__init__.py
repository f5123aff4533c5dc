"""Kernels that read the packed KV cache. One folder per operation, the same file names in each.

    cache_attention        queries over a packed cache, its exact tokens and logit sinks
    prefill_attention      a chunk that sees itself exactly, and is then encoded and stored
    fold_output, projected_attention   V's inverse transform inside the output projection

What they are made of, stored tokens alone and unnormalised, is `turboq_kernels.decode.decode`;
adapters for engines in JAX are `turboq_kernels.engines`. Names are loaded when first used.
"""

# pyright: strict

from typing import TYPE_CHECKING, Any

_NAMES = {
    "cache_attention": "turboq_kernels.attention.api",
    "fold_output": "turboq_kernels.attention.folded",
    "prefill_attention": "turboq_kernels.prefill.api:prefill",
    "projected_attention": "turboq_kernels.attention.folded",
}
_RENAMED = {"decode_attention": "turboq_kernels.decode.api:decode"}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from turboq_kernels.attention import cache_attention as cache_attention
    from turboq_kernels.attention import fold_output as fold_output
    from turboq_kernels.attention import projected_attention as projected_attention
    from turboq_kernels.prefill.api import prefill as prefill_attention

    __all__ = ["cache_attention", "fold_output", "prefill_attention", "projected_attention"]


def __getattr__(name: str) -> Any:
    from turboq.lazy import find

    return find(__name__, _NAMES, name, renamed=_RENAMED)


def __dir__() -> list[str]:
    return __all__
