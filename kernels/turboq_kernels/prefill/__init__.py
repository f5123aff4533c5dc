"""Prefill: a chunk of queries over the packed history and its own exact keys; `api` dispatches."""

from turboq_kernels.prefill.api import prefill as prefill
