"""Kernels that read the packed KV cache. One folder per operation, the same file names in each.

    cache_attention        queries over a packed cache, its exact tokens and logit sinks
    prefill_attention      a chunk that sees itself exactly, and is then encoded and stored
    fold_output, projected_attention   V's inverse transform inside the output projection

What they are made of, stored tokens alone and unnormalised, is `turboq_kernels.decode.decode`.
"""

# pyright: strict

from turboq_kernels.attention import cache_attention as cache_attention
from turboq_kernels.attention import fold_output as fold_output
from turboq_kernels.attention import projected_attention as projected_attention
from turboq_kernels.decode import decode as decode_attention  # noqa: F401 # pyright: ignore
from turboq_kernels.prefill.api import prefill as prefill_attention

__all__ = ["cache_attention", "fold_output", "prefill_attention", "projected_attention"]
