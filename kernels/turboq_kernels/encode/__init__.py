"""Encode: new keys and values into the packed cache, one token or a chunk; `api` dispatches."""

from turboq_kernels.encode.api import encode as encode
