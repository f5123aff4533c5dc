"""Any engine: the plan, readers in NumPy and C without dependencies, and a page to test with."""

from __future__ import annotations

import importlib.resources
import io

import jax
import jax.numpy as jnp
import numpy as np

from turboq.cache import composed, joint
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

GOLDEN, GOLDEN_JOINED = "page.npz", "joined.npz"
JOINED_TOKENS, JOINED_STRIDE = 8, 37  # positions 0, 37, ...
SOURCES = {  # name in the export -> here
    "read_plan.py": "reader_example.py",
    "turboq_page.h": "c/turboq_page.h",
    "turboq_page.c": "c/turboq_page.c",
}


def page(entry: Entry, seed: int = 0) -> dict[str, np.ndarray]:
    """One page of one head: random vectors x, what is stored of them, and what that decodes to.

    Packed fields are words [1, bits, 8, width], others one row per token (or block of tokens).
    Keys not stored after RoPE have `rotated` besides: what was decoded, at positions 0, 1, ...;
    units of joined heads are none (`joined`).
    """
    x = np.random.default_rng(seed).normal(size=(PAGE, entry.dim)).astype(np.float32)
    arrays = {name: jnp.asarray(values) for name, values in entry.arrays.items()}
    codec = entry.codec if entry.joint is None else composed.held(entry.codec)
    stored = jax.jit(codec.encode)(arrays, jnp.asarray(x))
    out = {"x": x, "decoded": np.asarray(jax.jit(codec.decode)(arrays, stored))}
    if entry.rope != "after" and entry.joint is None:
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
    for field in codec.fields:
        values = np.asarray(stored[field.name])
        if field.packed:
            values = pack_host(values.astype(np.uint8), field.bits)
        elif field.dtype == "bfloat16":
            values = values.astype(np.float32)
        out[field.name] = values
    return out


def joined(plan: Plan, arrays: Tensors, seed: int = 0) -> dict[str, np.ndarray]:
    """Random units of a few tokens of the first layer that joins heads, and what they stand for.

    Keys `k` are as they are stored, `rotated` as attention takes them at `positions`; empty where
    no layer joins heads.
    """
    layer = next((x for x in plan.layers if x.joint is not None), None)
    if layer is None:
        return {}
    of = plan.model.layers[layer.index]
    random = np.random.default_rng(seed)
    units = [
        random.normal(size=(JOINED_TOKENS, of.kv_heads, dim)).astype(np.float32)
        for dim in (of.k_dim, of.v_dim)
    ]
    held = plan.kv_layer(layer.index, arrays)
    mean, center, coded = (np.asarray(held.joint[n]) for n in ("mean", "center", "coded"))
    synthesis = np.asarray(joint.synthesis_of(held), np.float64)
    y = np.concatenate([x.reshape(JOINED_TOKENS, len(mean), -1) for x in units], axis=2)
    y = np.pad(y, ((0, 0), (0, 0), (0, 1)))  # where nothing is coded
    y = np.stack([y[:, j, coded[j]] for j in range(len(mean))], axis=1)
    x = (center + np.einsum("tjw,jcw->tjc", y, synthesis)).astype(np.float32)
    both = np.split(x, [of.k_dim * of.kv_heads // len(mean)], axis=2)
    k, v = (part.reshape(unit.shape) for part, unit in zip(both, units, strict=True))
    at = JOINED_STRIDE * np.arange(JOINED_TOKENS, dtype=np.int32)
    turning = {"mean": jnp.asarray(mean[:, : both[0].shape[2]].reshape(k.shape[1:]), jnp.float32)}
    keys = jnp.asarray(k.swapaxes(0, 1))[None]
    rotated = np.asarray(from_stored(held, turning, keys, jnp.asarray(at)[None])[0]).swapaxes(0, 1)
    return {
        "layer": np.asarray(layer.index), "positions": at, "k_units": units[0],
        "v_units": units[1], "k": k, "v": v, "rotated": rotated,
    }  # fmt: skip


class Reader(Exporter):
    """Everything is exact: the plan is handed over as it is."""

    name = "reader"
    title = "any engine: plan, readers in NumPy and C, golden page"
    versions = "plan schema 1"
    checked = "this version, run by its tests"
    ran = True
    latent = True
    joint = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return {}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        return (Constraints(k_rope=ROPE_FORMS, joins=True),)

    def policy(self, wanted):
        return wanted

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **page(found[0]))  # pyright: ignore[reportArgumentType]
        golden = {GOLDEN: buffer.getvalue()}
        if together := joined(plan, arrays):
            buffer = io.BytesIO()
            np.savez(buffer, **together)  # pyright: ignore[reportArgumentType]
            golden[GOLDEN_JOINED] = buffer.getvalue()
        here = importlib.resources.files("turboq.export")
        sources = {name: here.joinpath(place).read_bytes() for name, place in SOURCES.items()}
        return Projection(
            held={
                e.place: Held(format=e.codec.name, codec=e.codec, arrays=e.arrays, rope=e.rope)
                for e in found
            },
            files={**sources, **golden},
            flags=("plan, tensors = read_plan.read_plan('engine_plan')",),
            notes=(
                f"{GOLDEN} is a page of {found[0]}: words, scales, and what they decode to.",
                "turboq_page.h says how pages lie in memory; turboq_page.c reads them, in C99.",
            ),
            policy=plan.tokens,
        )
