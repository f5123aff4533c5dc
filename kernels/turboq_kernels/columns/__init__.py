"""Attention to the one pool of a model (`turboq.cache.model_cache`): bits per head are data."""

from turboq_kernels.columns.api import IMPLEMENTATIONS, attend, prepare
from turboq_kernels.columns.linear import LinearLayer

__all__ = ["IMPLEMENTATIONS", "LinearLayer", "attend", "prepare"]
