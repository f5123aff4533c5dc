"""Kernels that read the packed KV cache. One folder per operation, the same file names in each."""

from turboq_kernels.attention import cache_attention as cache_attention
