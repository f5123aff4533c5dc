"""Any engine: the plan, readers in NumPy and C without dependencies, and a page to test with."""

from __future__ import annotations

import importlib.resources
import io

import jax
import jax.numpy as jnp
import numpy as np

from turboq.cache.key_form import from_stored
from turboq.cache.layer import KVLayer, TokenPolicy
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Projection,
    Tensors,
    entries,
)
from turboq.numbers.packing import PAGE, pack_host
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints
from turboq.plan.geometry import ROPE_FORMS, rope_block

GOLDEN = "page.npz"
SOURCES = {  # name in the export -> here
    "read_plan.py": "reader_example.py",
    "turboq_page.h": "c/turboq_page.h",
    "turboq_page.c": "c/turboq_page.c",
}


def page(entry: Entry, seed: int = 0) -> dict[str, np.ndarray]:
    """One page of one head: random vectors x, what is stored of them, and what that decodes to.

    Packed fields are words [1, bits, 8, width], others one row per token (or block of tokens).
    Keys not stored after RoPE have `rotated` besides: what was decoded, at positions 0, 1, ...
    """
    x = np.random.default_rng(seed).normal(size=(PAGE, entry.dim)).astype(np.float32)
    arrays = {name: jnp.asarray(values) for name, values in entry.arrays.items()}
    stored = jax.jit(entry.codec.encode)(arrays, jnp.asarray(x))
    out = {"x": x, "decoded": np.asarray(jax.jit(entry.codec.decode)(arrays, stored))}
    if entry.rope != "after":
        assert entry.layer.rope is not None  # plans are refused without
        layer = KVLayer(
            groups=(),
            policy=TokenPolicy(),
            rope=entry.layer.rope,
            rope_block=rope_block(entry.rope),
        )
        heads = {name: values[None] for name, values in arrays.items()}
        at = jnp.arange(PAGE, dtype=jnp.int32)[None]
        keys = from_stored(layer, heads, jnp.asarray(out["decoded"])[None, None], at)
        out["rotated"] = np.asarray(keys[0, 0])
    for field in entry.codec.fields:
        values = np.asarray(stored[field.name])
        if field.packed:
            values = pack_host(values.astype(np.uint8), field.bits)
        elif field.dtype == "bfloat16":
            values = values.astype(np.float32)
        out[field.name] = values
    return out


class Reader(Exporter):
    """Everything is exact: the plan is handed over as it is."""

    name = "reader"
    title = "any engine: plan, readers in NumPy and C, golden page"
    versions = "plan schema 1"
    checked = "run by the tests"
    latent = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return {}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        return (Constraints(k_rope=ROPE_FORMS),)

    def policy(self, wanted):
        return wanted

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **page(found[0]))  # pyright: ignore[reportArgumentType]
        here = importlib.resources.files("turboq.export")
        sources = {name: here.joinpath(place).read_bytes() for name, place in SOURCES.items()}
        return Projection(
            held={
                e.place: Held(format=e.codec.name, codec=e.codec, arrays=e.arrays, rope=e.rope)
                for e in found
            },
            files={**sources, GOLDEN: buffer.getvalue()},
            flags=("plan, tensors = read_plan.read_plan('engine_plan')",),
            notes=(
                f"{GOLDEN} is a page of {found[0]}: words, scales, and what they decode to.",
                "turboq_page.h says how pages lie in memory; turboq_page.c reads them, in C99.",
            ),
            policy=plan.tokens,
        )
