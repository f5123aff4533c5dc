"""ejkernel's kernel registry (the kernels of EasyDeL): our pages under a name of their own.

    register()                                        once, after ejkernel is imported
    run = kernel_registry.get(ALGORITHM, platform="pallas", backend="tpu")
    out, kv_cache = run(queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc,
                        distribution, softmax_scale=scale)

takes what their `ragged_page_attention_v3` takes, but for `kv_cache`, which is (layer, pages):
`Plan.kv_layer` and `ragged.pages`. Their own `ragged_page_attention_v3_turboquant` stores nibbles
token by token, of one rotation and codebook; ours stores any plan in exactly its bits.

Read: ejkernel 0.0.80.3 (`ejkernel/kernels/_registry.py`; `_pallas/tpu` and `_xla` of that kernel).
EasyDeL 0.3.0 calls it through `easydel/operations/kernels/ragged_page_attention.py`, whose cache
views are its own: a view that holds (layer, pages) would be made there, and is not here.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedCache
from turboq_kernels.engines import ragged

ALGORITHM = "ragged_page_attention_v3_turboq"
# platform and backend of theirs -> implementation of ours
PLACES = {("pallas", "tpu"): "mosaic_tpu", ("triton", "gpu"): "triton", ("xla", "any"): "xla"}


def register(registry: Any = None) -> None:
    """Adds one implementation for each of `PLACES`, unless they are there.

    Args:
      registry: ejkernel's `KernelRegistry`; its global one by default.

    Raises:
      ImportError: ejkernel is not installed.
    """
    if registry is None:
        from ejkernel.kernels._registry import (
            kernel_registry,  # pyright: ignore[reportMissingImports]
        )

        registry = kernel_registry
    known = {(str(x.platform.value), str(x.backend.value)) for x in _known(registry)}
    for place, implementation in PLACES.items():
        if place not in known:
            registry.register(ALGORITHM, *place)(_kernel(implementation))


def _known(registry: Any) -> list[Any]:
    return registry.list_implementations(ALGORITHM)


def _kernel(implementation: str):
    def ragged_page_attention_v3_turboq(
        queries: Float[Array, "N H D"],
        keys: Float[Array, "N K D"],
        values: Float[Array, "N K E"],
        kv_cache: tuple[KVLayer, PagedCache],
        kv_lens: Int[Array, "B"],
        block_tables: Int[Array, "BP"],
        query_start_loc: Int[Array, "B1"],
        distribution: Int[Array, "3"],
        softmax_aux: Float[Array, "H"] | None = None,
        *,
        softmax_scale: float = 1.0,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        chunk_prefill_size: int | None = None,
        num_kv_pages_per_block: int | None = None,
        num_queries_per_block: int | None = None,
        vmem_limit_bytes: int | None = None,
    ) -> tuple[Float[Array, "N H E"], tuple[KVLayer, PagedCache]]:
        """Block sizes and the memory limit are the kernel's own and not looked at.

        Raises:
          ValueError: a scale of FP8 caches: what is stored has its own.
        """
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        given = [name for name, x in scales.items() if x is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: codecs of the plan have their own scales")
        layer, pages = kv_cache
        out, pages = ragged.attend(
            queries, keys, values, layer, pages,
            lengths=kv_lens, table=block_tables.reshape(kv_lens.shape[0], -1),
            query_starts=query_start_loc, sequences=distribution[2], scale=softmax_scale,
            window=sliding_window, softcap=logits_soft_cap, sink_logits=softmax_aux,
            chunk=chunk_prefill_size or ragged.CHUNK, implementation=implementation,
        )  # fmt: skip
        return out, (layer, pages)

    return ragged_page_attention_v3_turboq
