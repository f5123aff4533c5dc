"""One token of every sequence into the one pool, by one launch on a TPU: all that a step writes.

    cosines of the tokens' positions                                      XLA
    vectors as they are stored, y = matrix x of all heads                 `mosaic_tpu_vectors`
    codes of least error, 128 gains of vectors tried side by side         `mosaic_tpu_search`
    words with the codes' bits; sinks and recent tokens             `mosaic_tpu_token`

All is in place if pool and state are donated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import overflow
from turboq.cache.model_cache import LayerForm, LayerState
from turboq.cache.simulate import take_heads
from turboq.numbers import rope
from turboq_kernels.columns import mosaic_tpu_token
from turboq_kernels.columns.mosaic_tpu_token import Step
from turboq_kernels.encode import mosaic_tpu_window
from turboq_kernels.encode.mosaic_tpu_search import LANES, Search

MAX_VMEM = 12 * 2**20  # of the 16 MiB that one kernel may use by default
_EXACT = ("sinks", "recent")


def unsupported(state: LayerState, words: UInt32[Array, "N P R C"], tokens: int) -> str | None:
    """Why a step is not written so, or None."""
    form = state.form
    if tokens != 1:
        return f"{tokens} tokens of a sequence; one is appended"
    if words.shape[-1] % LANES:
        return f"a pool of {words.shape[-1]} lanes, no multiple of {LANES}"
    if any(codec.gain == "float16" for codec in form.codecs):
        return "a float16 gain per vector"
    if form.layer.policy.exact_dtype == "float16":
        return "exact tokens in float16, which kernels do not take"
    k, v = ((form.codecs[i].gain, _search(form, side, False)) for i, side in enumerate("kv"))
    if k != v:
        return f"keys and values that are searched apart: {k} and {v}"
    used = mosaic_tpu_token.vmem_bytes(specify(state, words, False), _turn_shape(form), form.layer)
    if used > MAX_VMEM:
        return f"{used} bytes of VMEM for {len(state.lengths)} sequences"
    return None


def _search(form: LayerForm, side: str, interpret: bool) -> Search:
    arrays = getattr(form.group, f"{side}_arrays")
    gains = arrays["gains"].shape[1] if "gains" in arrays else 0
    width = max(codec.dim for codec in form.codecs)
    return mosaic_tpu_window.search_of(arrays["taps"].shape[-1] - 1, gains, width, interpret)


def specify(state: LayerState, words: UInt32[Array, "N P R C"], interpret: bool) -> Step:
    """What is static about a step of this layer."""
    form, heads = state.form, len(state.form.group.heads)
    k, v = form.codecs
    return Step(
        search=_search(form, "k", interpret), heads=heads, dims=(k.dim, v.dim),
        joined=form.layer.joint_heads or 0, batch=len(state.lengths), gained=k.gain == "code",
        rope=form.layer.rope, block=form.layer.rope_block,
        # The layer's run may begin anywhere in a tile.
        lanes=min(_tiles(sum(form.most)) + LANES, words.shape[-1]),
        wide=_tiles(form.k.plane.shape[1]) + LANES,
    )  # fmt: skip


def _tiles(lanes: int) -> int:
    return -(-lanes // LANES) * LANES


def _turn_shape(form: LayerForm) -> tuple[int, int]:
    """Rows and channels of the matrix of one group, or of one head."""
    if form.layer.joint_heads is not None:
        return form.layer.joint["analysis"].shape[1:]
    width = max(codec.dim for codec in form.codecs)
    return width, width


def append(
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K E"],
    counts: Int[Array, "B"] | None,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[LayerState, UInt32[Array, "N P R C"]]:
    """`turboq.cache.model_cache.put` of one token."""
    form, s = state.form, specify(state, words, bool(interpret))
    counts = jnp.ones((k.shape[0],), jnp.int32) if counts is None else counts
    fitting, lost = overflow.split(state.lengths, counts, state.room(words))
    k, v = (take_heads(x, form.group.heads)[:, 0] for x in (k, v))
    sides = {}
    for side, columns in (("k", form.k), ("v", form.v)):
        arrays = getattr(form.group, f"{side}_arrays")
        sides[side] = {
            **{name: arrays[name] for name in ("step", "last", "weights")},
            "taps": jnp.moveaxis(arrays["taps"], -1, 0), "gains": arrays.get("gains"),
            "entry": columns.entry, "plane": columns.plane, "lane": columns.lane,
        }  # fmt: skip
    exact: dict[str, dict[str, Any]] = {"k": {}, "v": {}}
    for side, own in exact.items():
        every = {name: getattr(state.exact, f"{side}_{name}") for name in _EXACT}
        own |= {name: buffer for name, buffer in every.items() if buffer.shape[2]}
    scalars = {
        "lengths": state.lengths, "first": state.dropped, "fitting": fitting,
        "lane": jnp.asarray(form.first, jnp.int32), "table": state.table,
    }  # fmt: skip
    inputs = {
        "k": k, "v": v, "sides": sides, "turns": _turns(form), "joint": _of_joint(form, s),
        "cosines": _cosines(form, state.lengths, s),
    }  # fmt: skip
    kept = _launch(s, scalars, inputs, {"words": words, "exact": exact}, interpret)
    fresh = {f"{side}_{n}": x for side, own in kept["exact"].items() for n, x in own.items()}
    new = dataclasses.replace(
        state, exact=dataclasses.replace(state.exact, **fresh), lengths=state.lengths + fitting,
        overflow=state.overflow + lost,
    )  # fmt: skip
    return new, kept["words"]


def _turns(form: LayerForm) -> dict[str, Array]:
    """Matrices that turn vectors into coordinates, one of a group, or of each head's K and V."""
    if form.layer.joint_heads is not None:
        return {"both": form.layer.joint["analysis"]}
    return {"k": form.group.k_arrays["analysis"], "v": form.group.v_arrays["analysis"]}


def _of_joint(form: LayerForm, s: Step) -> dict[str, Array]:
    """What else is known of vectors."""
    held = form.layer.joint
    if not s.joined:
        return {"k": form.group.k_arrays["mean"], "v": form.group.v_arrays["mean"]}
    names = ("center", "analysis_channels", "analysis_scale", "coded")
    return {name: held[name] for name in names} | ({"mean": held["mean"]} if s.block > 1 else {})


def _cosines(form: LayerForm, positions: Int[Array, "B"], s: Step) -> tuple[Array, ...] | None:
    """Cosines and sines [n, B', H] of where blocks begin and, in longer ones, of what is left."""
    if s.rope is None:
        return None
    positions = jnp.pad(positions, (0, s.sequences - s.batch))
    offset = positions % s.block
    at = [positions - offset] + ([offset] if s.block > 1 else [])
    return rope.tables(s.rope, jnp.stack(at))


def _launch(s: Step, scalars, inputs, kept, interpret) -> dict[str, Any]:
    """`kept` with the tokens."""
    first, first_tree = jax.tree.flatten(scalars)
    given, tree = jax.tree.flatten(inputs)
    olds, old_tree = jax.tree.flatten(kept)
    scratch, scratch_tree = jax.tree.flatten(mosaic_tpu_token.scratch(s, inputs, kept["exact"]))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i, *_: (0,) * x.ndim)

    def of_group(name, x):
        first, last, rest = s.heads if name == "v" else 0, len(x) - 1, (0,) * (x.ndim - 1)
        return pl.BlockSpec(
            (None, *x.shape[1:]), lambda i, *_: (jnp.clip(i - first, 0, last), *rest)
        )

    specs: dict[str, Any] = jax.tree.map(whole, inputs)
    specs["turns"] = {name: of_group(name, x) for name, x in inputs["turns"].items()}
    outs = pl.pallas_call(
        functools.partial(
            mosaic_tpu_token.kernel, s=s,
            trees=(first_tree, tree, old_tree, old_tree, scratch_tree),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in olds],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first), grid=(s.groups + s.searches,),
            in_specs=[*jax.tree.leaves(specs), *[hbm] * len(olds)], out_specs=[hbm] * len(olds),
            scratch_shapes=scratch,
        ),
        input_output_aliases={len(first) + len(given) + i: i for i in range(len(olds))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="turboq_append",
    )(*first, *given, *olds)  # fmt: skip
    return jax.tree.unflatten(old_tree, outs)
