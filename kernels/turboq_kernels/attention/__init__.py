"""Attention over the packed cache: `api` dispatches, `base` is XLA."""

from turboq_kernels.attention.api import cache_attention as cache_attention
