"""Kernels that read the packed KV cache. One folder per operation, the same file names in each."""

from turboq_kernels.attention import cache_attention as cache_attention
from turboq_kernels.attention import fold_output as fold_output
from turboq_kernels.attention import projected_attention as projected_attention
from turboq_kernels.decode import decode as decode_attention  # noqa: F401
from turboq_kernels.prefill.api import prefill as prefill_attention  # noqa: F401
