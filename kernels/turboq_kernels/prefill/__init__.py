"""Prefill: a chunk of queries over the packed history and its own exact keys.

`api.prefill` is the call (`turboq_kernels.prefill_attention`), `kernels` dispatches. Nothing is
imported here: `attention` needs `kernels`, and `api` needs `attention`.
"""
