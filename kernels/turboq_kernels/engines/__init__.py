"""Adapters for engines in JAX, one file each; no engine is imported before it is asked for.

    ragged            what they share: a ragged batch over our pages, written, then attended to
    ejkernel          `ragged_page_attention_v3_turboq` in the kernel registry of ejkernel (EasyDeL)
    tpu_inference     an attention backend of vLLM on TPU
    maxtext           an object with the methods of MaxText's `KVQuant`

What of them was run, and where the rest would be: `docs/how-to/engine.md`.
"""
