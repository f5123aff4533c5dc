"""Attention over the packed cache: `api` joins stored and exact tokens, `folded` W_o as well."""

from turboq_kernels.attention.api import cache_attention as cache_attention
from turboq_kernels.attention.folded import fold_output as fold_output
from turboq_kernels.attention.folded import projected_attention as projected_attention
