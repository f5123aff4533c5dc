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

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

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

        def count(window: int | None) -> int:
            one = windows.pages_held(window, per_sequence * PAGE)
            return pages if window is None else min(pages, rows * one + per_sequence)

        counts = [count(window) for window in form.windows]
        self.pager = Pager(
            pages=counts, windows=form.windows, rows=rows, per_sequence=per_sequence, page=PAGE,
            recent=max(one.layer.ring for one in form.layers), evict=evict,
        )  # fmt: skip
        self.words = [
            bits.pool(1, n, model_cache.lanes_of(lanes))
            for n, lanes in zip(counts, form.columns, strict=True)
        ]
        self._rows = [
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
                self.words[i] = _copy_pages(self.words[i], *paged.padded(copies))
        if len(step.rows_copied):
            self._rows = _copy_rows(self._rows, *paged.padded(step.rows_copied))
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
        state, self.words[pool], self._rows[i], tail = _write(
            self.form.layers[i], self.words[pool], self._rows[i], where, k, v, pool, by
        )
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
        exact = [x for rows in self._rows for x in jax.tree.leaves(rows.exact)]
        reports = [self.pager.report(i) for i in range(len(self.words))]
        return paged.residency_of([words.nbytes for words in self.words], exact, reports)


def _state(form: LayerForm, rows: _Rows, where: Where, pool: int) -> LayerState:
    exact = jax.tree.map(lambda x: paged.rows_of(x, where.rows), rows.exact)
    starts = jnp.minimum(where.starts, where.room)  # behind an overflow: where it began
    # A row begins anew with its sequence.
    lost = jnp.where(starts > 0, rows.overflow[where.rows], 0)
    return LayerState(
        form=form, exact=exact, lengths=starts, overflow=lost,
        shared=SharedPages(table=where.tables[pool], room=where.room),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("pool", "by"), donate_argnums=(1, 2))
def _write(form: LayerForm, words, rows: _Rows, where: Where, k, v, pool: int, by: Write):
    state, words, tail = by(_state(form, rows, where, pool), words, k, v, where.counts)
    exact = jax.tree.map(lambda old, new: old.at[where.rows].set(new), rows.exact, state.exact)
    rows = _Rows(exact=exact, overflow=rows.overflow.at[where.rows].set(state.overflow))
    return state, words, rows, tail


@functools.partial(jax.jit, donate_argnums=0)
def _copy_pages(words: Words, page_from, page_to) -> Words:
    return words.at[:, page_to].set(words[:, page_from], mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _copy_rows(rows: list[_Rows], row_from, row_to) -> list[_Rows]:
    return jax.tree.map(lambda x: x.at[row_to].set(x[row_from], mode="drop"), rows)
