"""Bytes per token, cache size and longest context of a plan, or of a codec on a model.

Counts what `turboq.cache` allocates (whole pages, exact sinks and recent window) and the fitted
arrays and static tables; not weights or working memory.
"""

from __future__ import annotations

import json

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

REQUIRED = ()
RESUME = "run the same command again"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("plan", None, "Plan: a folder or plan.json.", flag_values=values)
    common.model(values, None)
    common.codec(values, "exact")
    common.policy(values, sinks=0)
    flags.DEFINE_integer("context", 32768, "Tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "memory_gib", None, "Memory for the cache in GiB: also print the longest context in it.",
        lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum("format", "table", ("table", "json"), "Output.", flag_values=values)


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq import accounting
    from turboq.plan import load
    from turboq.planner import max_context

    if (values.plan is None) == (values.model is None):
        raise TurboqError("give either --plan, or --model with --codec")
    if values.plan is not None:
        plan, _ = load(values.plan)
        name, layers = plan.model.name, plan.storage
    else:
        name, layers = _layers_of_model(values)
    at = accounting.residency(layers, context=values.context, batch=values.batch)
    longest = None
    if values.memory_gib is not None:
        longest = max_context(layers, nbytes=int(values.memory_gib * 2**30), batch=values.batch)
    result = {
        "model": name,
        "context": at.context,
        "batch": at.batch,
        "bytes_per_token": accounting.bits_per_token(layers) / 8,
        "bits_per_channel": accounting.bits_per_channel(layers),
        "kv_bytes": at.cache,
        "total_bytes": at.total,
        "bf16_bytes": at.baseline,
        "bits_per_channel_at_context": at.bits_per_channel,
        "memory_gib": values.memory_gib,
        "max_context": longest,
    }
    if values.format == "json":
        print(json.dumps(result, indent=1))
        return
    rows = {
        "model": name,
        "bytes per token": f"{result['bytes_per_token']:g}",
        "bits per channel": f"{result['bits_per_channel']:.3f} "
        f"({result['bits_per_channel_at_context']:.3f} at {at.context:,} tokens, all counted)",
        f"cache of {at.batch} x {at.context:,} tokens": accounting.readable(at.cache),
        "  quantized": accounting.readable(at.quantized),
        "  rest of the last page": accounting.readable(at.padding),
        "  exact sinks and recent": accounting.readable(at.sinks + at.recent),
        "arrays and tables": accounting.readable(at.arrays + at.tables),
        "the same in bf16": f"{accounting.readable(at.baseline)} ({at.compression:.2f}x)",
    }
    if longest is not None:
        rows[f"longest context in {values.memory_gib:g} GiB"] = f"{longest:,} tokens"
    width = max(map(len, rows))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows.items()))


def _layers_of_model(values: flags.FlagValues):
    """Storage of every layer of --model under the codec flags; reads the header only."""
    from turboq.layer import uniform_layer
    from turboq_calibrate.models.model import open_source

    spec = open_source(values.model).spec
    policy = common.policy_of(values)
    layers = tuple(
        uniform_layer(
            kv_heads=layer.kv_heads,
            k=common.codec_of(values, "k", layer.head_dim),
            v=common.codec_of(values, "v", layer.v_head_dim),
            policy=policy,
        )
        for layer in spec.layers
        if layer.owns_cache
    )
    return spec.name, layers
