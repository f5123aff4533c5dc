"""Run by test_sharding.py in its own process with 8 CPU devices: prints one JSON line."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, __file__.rsplit("/", 2)[0])  # tests/

import kernel_cases
import kv_cases

from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.codecs import PerHead, TurboQuantMSE
from turboq_kernels import cache_attention, sharding


def by_heads(rng, mesh, **options) -> float:
    """Two interleaving groups of 4 KV heads on 4 devices, against one device.

    A named kernel gets one of them: interpreted, it is a large program.
    """
    groups = (
        HeadGroup(
            heads=(1, 3, 4, 6), k=PerHead(dim=16, bits=3), v=TurboQuantMSE(dim=16, bits=2),
            k_arrays=kv_cases.learned(rng, 4, 3), v_arrays={},
        ),
        HeadGroup(
            heads=(0, 2, 5, 7), k=TurboQuantMSE(dim=16, bits=2), v=PerHead(dim=16, bits=4),
            k_arrays={}, v_arrays=kv_cases.learned(rng, 4, 4),
        ),
    )  # fmt: skip
    for g in groups:
        for arrays in (g.k_arrays, g.v_arrays):
            arrays.pop("scale", None)
    if options:
        groups = (dataclasses.replace(groups[0], heads=(0, 1, 2, 3)),)
    layer = KVLayer(groups=groups, policy=TokenPolicy(sinks=2, recent=4))
    k, v = kv_cases.tokens(rng, layer, 20)
    q = jnp.asarray(rng.standard_normal((2, 2, 2 * layer.kv_heads, 16)), jnp.float32)
    sinks = jnp.asarray(rng.standard_normal(q.shape[2]), jnp.float32)
    cache, tail = kv_cache.write(layer, kv_cache.init(layer, batch=2, capacity=256), k, v)
    positions = jnp.asarray([[18, 19]] * 2, jnp.int32)
    one = cache_attention(
        q, layer, cache, tail, q_positions=positions, scale=0.3, sink_logits=sinks
    )
    many = sharding.attention_by_heads(
        q, layer, sharding.heads_sharding(cache, mesh, "heads"), tail, mesh=mesh, axis="heads",
        q_positions=positions, sink_logits=sinks, scale=0.3, **options,
    )  # fmt: skip
    assert np.abs(np.asarray(one)).max() > 0.1
    return float(np.abs(np.asarray(one) - np.asarray(many)).max())


def by_sequence(mesh, **options) -> float:
    """8 pages of 64 tokens on 4 devices; lengths that leave devices empty, against one device."""
    case = kernel_cases.make(
        "prod", dim=16, page=64, lengths=(500, 3, 130, 0), spare_pages=0, bias=True, window=200
    )
    heads, count = case.q.shape[1], case.pages.table.shape[1]

    def deep(side):
        def each(arrays):
            return tuple(
                None if x is None else x.reshape(4, heads, count, *x.shape[1:]) for x in arrays
            )

        return dataclasses.replace(
            side, words=each(side.words), scales=each(side.scales), offsets=each(side.offsets)
        )

    part = sharding.decode_by_sequence(
        case.q, deep(case.k), deep(case.v), case.starts, case.ends, mesh=mesh, axis="pages",
        **(case.options | options),
    )  # fmt: skip
    kernel_cases.check(case, part)
    one = case.run()
    return float(np.abs(np.asarray(one.total) - np.asarray(part.total)).max())


def main() -> None:
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("heads", "pages"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    four = jax.make_mesh((2, 4), ("rest", "pages"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    out = {"devices": jax.device_count(), "heads": by_heads(rng, mesh), "pages": by_sequence(four)}
    for name in sys.argv[1:]:
        out[f"heads_{name}"] = by_heads(rng, mesh, implementation=name, interpret=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
