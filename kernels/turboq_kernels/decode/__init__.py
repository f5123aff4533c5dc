"""Decode: one or a few query tokens per sequence over stored tokens; `api` dispatches."""

from turboq_kernels.decode.api import decode as decode
from turboq_kernels.decode.types import Pages as Pages
from turboq_kernels.decode.types import Partial as Partial
from turboq_kernels.decode.types import Side as Side
from turboq_kernels.decode.types import contiguous_pages as contiguous_pages
from turboq_kernels.decode.types import pool_pages as pool_pages
