"""The one pool of a model (`turboq.cache.model_cache`) by kernels: bits per head are data."""

from turboq_kernels.columns.api import IMPLEMENTATIONS, attend, prepare
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.columns.writer import WRITERS, write
from turboq_kernels.columns.writer import unsupported as cannot_write

__all__ = [
    "IMPLEMENTATIONS",
    "WRITERS",
    "LinearLayer",
    "attend",
    "cannot_write",
    "prepare",
    "write",
]
