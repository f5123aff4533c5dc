"""The one pool of a learned plan (`turboq.cache.model_cache`) with pages that sequences share.

As `turboq.cache.pool.Pool` is for layers whose caches are their own; here the tokens of all layers
lie in one buffer (of layers with a sliding window in one of theirs), so a page that is copied is
copied once for the whole model.

pool = ModelPool(layers, pages=1024, rows=64, per_sequence=128)
a = pool.pager.create()
where = pool.step([a], [512])                         # the prompt's pages
for i in range(len(layers)):                          # in the model's forward pass
    state, words, tail = pool.write(i, where, k, v, by=columns.write)
    out = columns.attend(q, state, words, tail, q_positions=at, scale=scale)
b = pool.pager.fork(a)                                # shares the prompt's pages
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import columns as bits
from turboq.cache import model_cache, paged, windows
from turboq.cache.contiguous import GroupBuffers, Tail
from turboq.cache.layer import KVLayer
from turboq.cache.model_cache import LayerForm, LayerState, SharedPages
from turboq.cache.paged import Residency, Where
from turboq.cache.pager import Evict, Pager
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE

Words = UInt32[Array, "1 N R C"]
# `model_cache.write`, or one that encodes by a kernel.
Write = Callable[..., tuple[LayerState, Words, Tail]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """What a layer keeps of every row beside its pages."""

    exact: GroupBuffers  # [rows, K, tokens, D]
    overflow: Any  # int32 [rows]


class ModelPool:
    """A pager and the pool of all layers, which are those of one plan.

    Args: those of `turboq.cache.pager.Pager`, and one `KVLayer` per layer. `pages` are those of the
      layers without a window; those of a window are counted as in `turboq.cache.pool.Pool`.

    Raises:
      TurboqError: layers whose heads differ in more than data: `Pool` takes them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from turboq import ModelPool, TokenPolicy, Transform, uniform_layer
      >>> from turboq.codecs.observed import Observed
      >>> codec = Transform(dim=8, segments=((8, 2),), quantizer="window", states=16, gain="code")
      >>> seen = Observed.of(np.random.default_rng(0).normal(size=(1, 50, 8)).astype(np.float32))
      >>> arrays = {name: jnp.asarray(x) for name, x in codec.fit(seen).items()}
      >>> fitted = {"k_arrays": arrays, "v_arrays": arrays}
      >>> layer = uniform_layer(kv_heads=1, k=codec, v=codec, policy=TokenPolicy(), **fitted)
      >>> pool = ModelPool([layer], pages=4, rows=2, per_sequence=2)
      >>> one = pool.pager.create()
      >>> where = pool.step([one], [30])
      >>> k = v = jnp.ones((1, 30, 1, 8))
      >>> state, words, tail = pool.write(0, where, k, v)
      >>> two = pool.pager.fork(one)  # shares the page
      >>> pool.residency().shared == words.nbytes // 4
      True
    """

    def __init__(
        self,
        layers: Sequence[KVLayer],
        *,
        pages: int,
        rows: int,
        per_sequence: int,
        evict: Evict | None = None,
    ):
        form = model_cache.forms(layers)
        if form is None:
            raise TurboqError(
                "these layers are no learned plan that one pool holds (transforms of one kind): "
                "turboq.Pool takes them"
            )
        self.form = form

        counts = [
            windows.pool_pages(pages, window, rows=rows, per_sequence=per_sequence)
            for window in form.windows
        ]
        self.pager = Pager(
            pages=counts, windows=form.windows, rows=rows, per_sequence=per_sequence, page=PAGE,
            recent=max(one.layer.ring for one in form.layers), evict=evict,
        )  # fmt: skip
        self.words: list[Words] = [
            bits.pool(1, n, model_cache.lanes_of(lanes))
            for n, lanes in zip(counts, form.columns, strict=True)
        ]
        self._rows: list[_Rows] = [
            _Rows(exact=model_cache.exact_of(one, rows), overflow=jnp.zeros((rows,), jnp.int32))
            for one in form.layers
        ]

    def step(self, names: Sequence[int], counts: Sequence[int]) -> Where:
        """Makes room for `counts[i]` more tokens of each sequence, copying what is shared.

        Raises:
          TurboqError: as `Pager.plan`.
        """
        step = self.pager.plan(names, counts)
        for i, copies in enumerate(step.copies):
            if len(copies):
                self.words[i] = cast(Words, _copy_pages(self.words[i], *paged.padded(copies)))
        if len(step.rows_copied):
            moves = paged.padded(step.rows_copied)
            self._rows = cast(list[_Rows], _copy_rows(self._rows, *moves))
        return paged.locate(step)

    def write(
        self,
        i: int,
        where: Where,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K E"],
        by: Write = model_cache.write,
    ) -> tuple[LayerState, Words, Tail]:
        """Stores the step's tokens in layer i: what `model_cache.attend` takes.

        `by` is `model_cache.write` (XLA) or `turboq_kernels.columns.write`.

        Raises:
          TurboqError: outside jit, tokens that do not fit.
        """
        paged.check_room(where)
        pool = self.form.pool_of[i]
        given = self.form.layers[i], self.words[pool], self._rows[i], where, k, v
        written = cast(tuple[LayerState, Words, _Rows, Tail], _write(*given, pool, by))
        state, self.words[pool], self._rows[i], tail = written
        return state, self.words[pool], tail

    def state(self, i: int, where: Where) -> tuple[LayerState, Words]:
        """Layer i of the step's sequences before it, and its pool."""
        pool = self.form.pool_of[i]
        return _state(self.form.layers[i], self._rows[i], where, pool), self.words[pool]

    def overflows(self) -> list[Int[Array, "rows"]]:
        """Tokens of every row that were not stored, of every layer (`turboq.cache.overflow`)."""
        return [rows.overflow for rows in self._rows]

    def residency(self) -> Residency:
        """Bytes of all layers: reserved, active, shared, exact tokens, fragmentation."""
        exact: list[Array] = [x for rows in self._rows for x in jax.tree.leaves(rows.exact)]
        reports = [self.pager.report(i) for i in range(len(self.words))]
        return paged.residency_of([words.nbytes for words in self.words], exact, reports)


def _state(form: LayerForm, rows: _Rows, where: Where, pool: int) -> LayerState:
    def own(x: Array) -> Array:
        return paged.rows_of(x, where.rows)

    starts = jnp.minimum(where.starts, where.room)  # behind an overflow: where it began
    # A row begins anew with its sequence.
    lost = jnp.where(starts > 0, rows.overflow[where.rows], 0)
    return LayerState(
        form=form, exact=_each(own, rows.exact), lengths=starts, overflow=lost,
        shared=SharedPages(table=where.tables[pool], room=where.room),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("pool", "by"), donate_argnums=(1, 2))
def _write(
    form: LayerForm, words: Words, rows: _Rows, where: Where, k: Array, v: Array, pool: int,
    by: Write,
) -> tuple[LayerState, Words, _Rows, Tail]:  # fmt: skip
    state, words, tail = by(_state(form, rows, where, pool), words, k, v, where.counts)

    def put(old: Array, new: Array) -> Array:
        return old.at[where.rows].set(new)

    exact = _each(put, rows.exact, state.exact)
    return state, words, _Rows(exact=exact, overflow=put(rows.overflow, state.overflow)), tail


@functools.partial(jax.jit, donate_argnums=0)
def _copy_pages(words: Words, page_from: Array, page_to: Array) -> Words:
    return words.at[:, page_to].set(words[:, page_from], mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _copy_rows(rows: list[_Rows], row_from: Array, row_to: Array) -> list[_Rows]:
    def copy(x: Array) -> Array:
        return x.at[row_to].set(x[row_from], mode="drop")

    return [_Rows(exact=_each(copy, one.exact), overflow=copy(one.overflow)) for one in rows]


def _each(of: Callable[..., Array], *exact: GroupBuffers) -> GroupBuffers:
    """Of every buffer of exact tokens."""
    return cast(GroupBuffers, jax.tree.map(of, *exact))
