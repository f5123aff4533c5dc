"""Runs many versions of one model side by side: every row has its own choice of candidates.

A layer is split into three compiled parts, project -> quantize -> finish. Only the middle one knows
the codecs, so plans of any shape share the two expensive ones. The numbers are those of
`turboq.cache.simulate` (first `sinks` and last `recent` tokens exact), up to float32 rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from turboq.cache import joint, key_form
from turboq.cache.exact_attention import attention_over_segments, causal
from turboq.cache.layer import KVLayer, TokenPolicy
from turboq.cache.simulate import quantize_dequantize, round_exact
from turboq.errors import TurboqError
from turboq.plan.build import Side
from turboq.plan.geometry import rope_block
from turboq.plan.types import SIDES
from turboq_calibrate.candidates.table import Option, Table
from turboq_calibrate.cost import metrics
from turboq_calibrate.models import Model, default_positions, embed_tokens, exact_attend
from turboq_calibrate.models.decoder import (
    Params,
    head,
    join_attention,
    met,
    run_feed_forward,
    run_head,
    run_layer,
    run_project,
    sinks_of,
)
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.models.stream import lend

EXACT = -1  # the choice of a unit that is not quantized

_quantize = jax.jit(quantize_dequantize, static_argnames=("codec",))


def quantized(option: Option, x: Float[Array, "B T K D"]) -> Float[Array, "B T K D"]:
    """decode(encode(x)) of every head with its own codec; one compile per codec and shape.

    Learned transforms differ in every head, and are one program together.
    """
    if option.padded is not None:
        return _quantize(option.padded[0], option.padded[1], x)
    heads = x.shape[2]
    parts, order = [], []
    for codec, members, arrays in option.groups:
        if len(members) == heads:
            return _quantize(codec, jax.tree.map(jnp.asarray, arrays), x)
        # Always K heads, the first repeated, so that group sizes do not compile anew.
        rows = np.array([*range(len(members)), *[0] * (heads - len(members))])
        chosen = x[:, :, np.array(members)[rows]]
        stacked = {name: jnp.asarray(values[rows]) for name, values in arrays.items()}
        parts.append(_quantize(codec, stacked, chosen)[:, :, : len(members)])
        order.extend(members)
    return jnp.concatenate(parts, axis=2)[:, :, np.argsort(order)]


def mixed_attention(
    spec: LayerSpec,
    policy: TokenPolicy,
    q: Float[Array, "B T H Q"],
    near: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    far: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Causal attention that sees `near` (keys, values) for exact tokens and `far` for the others.

    Query t sees token s exactly if s < sinks or s > t - recent.
    """
    batch, t = q.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (batch, t))
    if policy.sinks:
        sink = (positions < policy.sinks)[:, :, None, None]
        far = (jnp.where(sink, near[0], far[0]), jnp.where(sink, near[1], far[1]))
    seen = causal(positions, window=spec.window)
    if not policy.recent:
        segments = [(met(spec, *far), far[1], seen)]
    else:

        def packed(at):
            old = positions[:, None, :] <= (at - policy.recent)[:, :, None]
            return old | (positions < policy.sinks)[:, None, :]

        segments = [
            (met(spec, *far), far[1], lambda at: seen(at) & packed(at)),
            (met(spec, *near), near[1], lambda at: seen(at) & ~packed(at)),
        ]
    return attention_over_segments(
        q, segments, scale=spec.scale, softcap=spec.softcap, sink_logits=sinks, window=spec.window
    )


@functools.partial(jax.jit, static_argnames=("spec", "policy"))
def finish(
    spec: LayerSpec,
    policy: TokenPolicy,
    params: Params,
    x: Float[Array, "B T M"],
    q: Float[Array, "B T H Q"],
    clean: dict[str, Array],
    hat: dict[str, Array],
    used: dict[str, Bool[Array, "B K"]],
) -> Float[Array, "B T M"]:
    """The layer up to its MLP, quantized; heads that are not `used` are exact in every token."""

    def rounded(side: str) -> Array:
        mask = used[side][:, None, :, None]
        return jnp.where(mask, round_exact(policy, clean[side]), clean[side])

    near = (rounded("k"), rounded("v"))
    sinks = sinks_of(spec, params)
    out = mixed_attention(spec, policy, q, near, (hat["k"], hat["v"]), *sinks)
    return join_attention(spec, params, x, out)


@functools.partial(jax.jit, static_argnames=("spec",))
def _block_kl(
    spec: ModelSpec, params: Params, exact: dict[str, Array], x: Float[Array, "P n M"]
) -> Float[Array, "P n"]:
    """KL at one block of positions; the logits of one row exist at a time."""
    targets = jnp.zeros(x.shape[1], jnp.int32)

    def row(y):
        return metrics.compare(exact, head(spec, params, y[None])[0], targets)["kl"]

    return jax.lax.map(row, x)


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over the layers: the input of every layer and the last output, [L + 1] x [W, T, M],
    and what quantization added to K and V of every layer (None: an exact pass)."""

    hidden: list[Array]
    errors: list[dict[str, Array]] | None


class Engine:
    """A model, its candidates, and the exact predictions on a few windows tokens [W, T].

    Keeps 4 W T V bytes of log-probabilities; every `Run` 4 W T (Z (L + 1) + 2 K D L), Z
    channels of the stream (`models.stream`).

    Raises:
      TurboqError: a layer with its own cache has no candidates, or the windows are too short.
    """

    def __init__(
        self, model: Model, table: Table, tokens: Int[np.ndarray, "W T"], policy: TokenPolicy
    ):
        owners = tuple(i for i, s in enumerate(model.spec.layers) if s.owns_cache)
        if owners != table.layers:
            raise TurboqError(f"candidates are for layers {table.layers}, the model has {owners}")
        if tokens.shape[0] < 1 or tokens.shape[1] < 2 + policy.sinks + policy.recent:
            raise TurboqError(
                f"windows of shape {tokens.shape}: need two tokens more than are exact"
            )
        if table.k_rope not in ("after", "before") and table.joint_heads is None:
            raise TurboqError(
                f"keys are measured side by side before or after RoPE, not {table.k_rope}"
            )
        self.model, self.table, self.policy = model, table, policy
        self.tokens = np.asarray(tokens, np.int32)
        self.windows = self.tokens.shape[0]
        self._stored = {i: self._layer_stored(i) for i in owners}
        self._choice_rows = {key: table.rows(*key) for key in table.options}
        self.exact = self.run()
        self._reference = self._references(self.exact.hidden[-1])

    def run(self, chosen: Int[np.ndarray, "U"] | None = None) -> Run:
        """Passes the windows through the model under one choice (None: exact)."""
        x = embed_tokens(self.model, self.tokens)
        hidden, errors = [x], []
        choice = np.full((1, len(self.table.units)), EXACT) if chosen is None else chosen[None]
        for i in range(len(self.model.spec.layers)):
            x, added = self._layer(i, x, choice, keep=chosen is not None)
            hidden.append(x)
            errors.append(added)
        return Run(hidden, None if chosen is None else errors)

    def kl(
        self, choices: Int[np.ndarray, "P U"], *, start: int = 0, run: Run | None = None,
        frozen: bool = False,
    ) -> Float[np.ndarray, "P W"]:  # fmt: skip
        """Mean KL in nats per token of every row and window, from layer `start` on.

        Args:
          choices: candidate of every unit, `EXACT` for none. Rows may differ from the pass `run`
            (by default the exact one) only from layer `start` on.
          frozen: later layers get what quantization added in `run` instead of being quantized
            again. Quantizers turn any small change into another draw of their noise, of several
            per cent of the KL; with the noise held still, small differences can be measured.
        """
        run = self.exact if run is None else run
        x = run.hidden[start]
        for i in range(start, len(self.model.spec.layers)):
            added = run.errors[i] if frozen and i > start and run.errors is not None else None
            x, _ = self._layer(i, x, choices, added=added)
        return self._kl(x)

    def _layer(
        self, i: int, x: Array, choices: np.ndarray, *,
        added: dict[str, Array] | None = None, keep: bool = False,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        """Layer i for all rows; x holds either every row or one window set that they share.

        A layer that reads another's cache makes of its exact K and V what the owner made of them.
        """
        spec, params = self.model.spec.layers[i], self.model.layer(i)
        rows = len(choices) * self.windows
        owner = spec.cache_at(i)
        if owner not in self._stored:
            x = _repeat(x, rows)
            where = self.positions(rows)
            return run_layer(spec, params, x, where, exact_attend, None)[0], {}
        where = self.positions(x.shape[0])
        q, k, v = run_project(spec, params, x, where)
        clean, used = {"k": _repeat(k, rows), "v": _repeat(v, rows)}, {}
        stored = self._stored[owner]
        coded = _to_stored(stored, k, v, where)
        values: dict[Side, Array] = {"k": coded[0], "v": coded[1]}
        hat = {side: _repeat(y, rows) for side, y in values.items()}
        for side, y in values.items():
            choice = np.repeat(choices[:, self._choice_rows[owner, side]], self.windows, axis=0)
            used[side] = jnp.asarray(choice != EXACT)
            for c in [] if added is not None else np.unique(choice[choice != EXACT]):
                new = _repeat(quantized(self.table.options[owner, side][c], y), rows)
                hat[side] = _take(jnp.asarray(choice == c), new, hat[side])
        used = _together(stored, used)
        if added is not None:
            hat = {side: clean[side] + _repeat(added[side], rows) for side in SIDES}
        else:
            read = _from_stored(stored, hat["k"], hat["v"], self.positions(rows))
            # A head of which nothing is quantized is exact, whatever turning it rounds.
            hat = {s: _take(used[s], y, clean[s]) for s, y in zip(SIDES, read, strict=True)}
        errors = {side: hat[side] - clean[side] for side in SIDES} if keep else {}
        x = lend(spec, _repeat(x, rows), clean["k"], clean["v"])
        y = finish(spec, self.policy, params, x, _repeat(q, rows), clean, hat, used)
        return run_feed_forward(spec, params, y, x), errors

    def _layer_stored(self, i: int) -> KVLayer:
        """Layer i with how keys and values stand where they are stored, and no codecs."""
        spec, table = self.model.spec.layers[i], self.table
        turned = KVLayer(groups=(), policy=self.policy)
        if table.k_rope != "after" and spec.rope is not None:
            turned = dataclasses.replace(
                turned, rope=spec.rope, rope_block=rope_block(table.k_rope)
            )
        if table.joint_heads is None:
            return turned
        return dataclasses.replace(
            turned, joint_heads=table.joint_heads, joint=joint.arrays_of(table.joint[i])
        )

    def positions(self, rows: int) -> Int[Array, "B T"]:
        return default_positions(jnp.zeros((rows, self.tokens.shape[1]), jnp.int32))

    def blocks(self, x: Float[Array, "B T M"]) -> Float[Array, "P blocks n M"]:
        """Rows of W windows, their positions in equal blocks (the last one padded)."""
        flat = x.reshape(-1, self.tokens.size, x.shape[-1])
        count = math.ceil(self.tokens.size / metrics.BLOCK)
        size = math.ceil(self.tokens.size / count)
        flat = jnp.pad(flat, ((0, 0), (0, count * size - self.tokens.size), (0, 0)))
        return flat.reshape(flat.shape[0], count, size, -1)

    def _references(self, x: Array) -> list[dict[str, Array]]:
        params = self.model.head_params()
        blocks = self.blocks(x)[0]
        targets = jnp.zeros(blocks.shape[1], jnp.int32)
        return [
            metrics.reference(run_head(self.model.spec, params, b[None])[0], targets)
            for b in blocks
        ]

    def _kl(self, x: Array) -> Float[np.ndarray, "P W"]:
        params, blocks = self.model.head_params(), self.blocks(x)
        parts = [
            np.asarray(_block_kl(self.model.spec, params, exact, blocks[:, i]), np.float64)
            for i, exact in enumerate(self._reference)
        ]
        kl = np.concatenate(parts, axis=1)[:, : self.tokens.size]
        # Positions that can see a quantized token; the last one predicts nothing.
        first = self.policy.sinks + self.policy.recent
        kl = kl.reshape(len(kl), *self.tokens.shape)[:, :, first:-1]
        if not np.all(np.isfinite(kl)):
            raise TurboqError("predictions are not finite under some candidate")
        return kl.mean(axis=2)


@jax.jit
def _to_stored(layer: KVLayer, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
    if layer.joint_heads is not None:
        return joint.to_units(layer, k, v, positions)
    return key_form.to_stored(layer, {}, k.swapaxes(1, 2), positions).swapaxes(1, 2), v


@jax.jit
def _from_stored(layer: KVLayer, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
    if layer.joint_heads is not None:
        return joint.from_units(layer, k, v, positions)
    return key_form.from_stored(layer, {}, k.swapaxes(1, 2), positions).swapaxes(1, 2), v


def _together(layer: KVLayer, used: dict[str, Array]) -> dict[str, Array]:
    """Which heads are quantized in any part: of joined heads all that share a unit."""
    if layer.joint_heads is None:
        return used
    either = used["k"] | used["v"]
    groups = jnp.any(either.reshape(len(either), -1, layer.joint_heads), axis=2)
    every = jnp.repeat(groups, layer.joint_heads, axis=1)
    return {"k": every, "v": every}


@jax.jit
def _take(mask: Bool[Array, "B K"], new: Any, old: Any) -> Any:
    return jnp.where(mask[:, None, :, None], new, old)


def _repeat(x: Array, rows: int) -> Array:
    """`x` for every row: itself, or its windows repeated row by row."""
    if x.shape[0] == rows:
        return x
    return jnp.tile(x, (rows // x.shape[0],) + (1,) * (x.ndim - 1))
