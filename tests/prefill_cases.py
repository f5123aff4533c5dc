"""Inputs for the prefill kernels: many query rows over stored tokens, or over exact ones.

case = history("turboquant_3", tokens=50, group=3, lengths=(300, 7))     # a `kernel_cases.Case`
check(case, run(case, implementation="triton", interpret=True), tolerance=...)
case = own(tokens=50, ring=9)
check(case, case.run(implementation="triton", interpret=True), tolerance=...)

The oracles are float64 NumPy; stored vectors come from `kernel_oracle.vector_at`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import kernel_cases
import kernel_oracle
import numpy as np

from turboq_kernels.prefill import kernels


def history(
    name: str,
    *,
    tokens: int = 30,
    group: int = 3,
    lengths: tuple[int, ...] = (300, 7),
    sinks: int = 0,
    window: int | None = None,
    recent: int = 0,
    padding: int = 0,
    seed: int = 0,
    **options: Any,
) -> kernel_cases.Case:
    """A chunk of `tokens` query tokens behind lengths[b] stored ones; options as `kernel_cases`.

    Query token t is at position lengths[b] + t and sees the stored tokens from its window's first
    (or the sinks' end) up to `recent` before itself. The last `padding` tokens see nothing.
    """
    case = kernel_cases.make(
        name, tokens=tokens, group=group, lengths=lengths, seed=seed, **options
    )
    at = np.asarray(lengths)[:, None] + np.arange(tokens)[None, :]
    starts = np.full_like(at, sinks)
    if window is not None:
        starts = np.maximum(starts, at - window + 1)
    ends = np.minimum(np.asarray(lengths)[:, None], np.maximum(at + 1 - recent, 0))
    ends[:, tokens - padding :] = 0
    starts, ends = (jnp.asarray(np.repeat(x, group, axis=1), jnp.int32) for x in (starts, ends))
    return case.replace(starts=starts, ends=ends)


def args(case: kernel_cases.Case) -> tuple[Any, ...]:
    """Positional arguments of `turboq_kernels.prefill.kernels.history`."""
    return case.q, case.k, case.v, case.pages, case.starts, case.ends


def run(case: kernel_cases.Case, **options):
    """`turboq_kernels.prefill.kernels.history` of a case."""
    return kernels.history(*args(case), **case.options | options)


def with_bfloat16_tables(case: kernel_cases.Case) -> kernel_cases.Case:
    """The case with level tables that bfloat16 holds exactly: what is left is rounding of sums."""

    def rounded(side):
        tables = tuple(
            None if t is None else t.astype(jnp.bfloat16).astype(jnp.float32) for t in side.tables
        )
        return dataclasses.replace(side, tables=tables)

    return case.replace(k=rounded(case.k), v=rounded(case.v))


@dataclasses.dataclass(frozen=True)
class Own:
    """Arguments of `turboq_kernels.prefill.kernels.own`."""

    q: Any
    k: Any
    v: Any
    positions: Any
    lower: Any
    upper: Any
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.positions, self.lower, self.upper

    def run(self, **options):
        return kernels.own(*self.args, **self.options | options)

    def replace(self, **changes) -> Own:
        return dataclasses.replace(self, **changes)

    def oracle(self) -> kernel_oracle.Softmax:
        s = np.asarray(self.positions)[:, None, :]
        lower, upper = (np.asarray(x)[..., None] for x in (self.lower, self.upper))
        seen = (s >= 0) & (s >= lower) & (s <= upper)
        return softmax(self.q, self.k, self.v, seen, **self.options)


def own(
    *,
    tokens: int = 40,
    group: int = 3,
    heads: int = 2,
    dim: int = 64,
    v_dim: int | None = None,
    ring: int = 0,
    starts: tuple[int, ...] = (0, 700),
    counts: tuple[int, ...] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Own:
    """A chunk behind a ring: entries are `ring` recent tokens in ring order, then `tokens` own.

    Sequence b's chunk begins at position starts[b]; of it counts[b] tokens are real. Empty slots
    and padding have position -1 and hold NaN, as do entries that no row sees because of `window`.
    """
    rng = np.random.default_rng(seed)
    batch, entries = len(starts), ring + tokens
    counts = counts or (tokens,) * batch
    steps = np.arange(tokens)
    positions = np.full((batch, entries), -1)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for s in range(max(start - ring, 0), start):
            positions[b, s % ring] = s
        positions[b, ring:] = np.where(steps < count, start + steps, -1)
    at = np.asarray(starts)[:, None] + steps[None, :]
    upper = np.where(steps[None, :] < np.asarray(counts)[:, None], at, -1)
    lower = np.zeros_like(at) if window is None else at - window + 1
    lower, upper = (np.repeat(x, group, axis=1) for x in (lower, upper))
    q = rng.standard_normal((batch, heads, tokens * group, dim)).astype(np.float32)
    k = rng.standard_normal((batch, heads, entries, dim))
    v = rng.standard_normal((batch, heads, entries, v_dim or dim))
    s = positions[:, None, :]
    used = ((s >= 0) & (s >= lower[..., None]) & (s <= upper[..., None])).any(axis=1)
    k, v = (np.where(used[:, None, :, None], x, np.nan) for x in (k, v))
    k, v = (jnp.asarray(x, jnp.dtype(dtype)) for x in (k, v))
    positions, lower, upper = (jnp.asarray(x, jnp.int32) for x in (positions, lower, upper))
    options = {"scale": float(dim**-0.5), "softcap": softcap}
    return Own(jnp.asarray(q), k, v, positions, lower, upper, options)


def softmax(q, k, v, seen, *, scale, softcap=None, bias=None) -> kernel_oracle.Softmax:
    """Rows q [B, N, M, C] over k, v [B, N, S, .] where seen [B, M, S], in float64."""
    seen = np.asarray(seen)[:, None]
    used = seen.any(axis=2)[..., None]
    q = np.asarray(q, np.float64)
    k, v = (np.where(used, np.asarray(x, np.float64), 0.0) for x in (k, v))
    logits = np.einsum("bnmc,bnsc->bnms", q, k)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)[..., None]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = p.sum(axis=-1, keepdims=True)
    p = p / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return kernel_oracle.Softmax(
        out=np.einsum("bnms,bnse->bnme", p, v),
        lse=lse,
        mean_abs=np.einsum("bnms,bnse->bnme", p, np.abs(v)),
    )


def oracle(case: kernel_cases.Case | Own) -> kernel_oracle.Softmax:
    """The float64 softmax of a case; every stored vector is unpacked once."""
    if isinstance(case, Own):
        return case.oracle()
    table, page = np.asarray(case.pages.table), case.k.page
    starts, ends = np.asarray(case.starts), np.asarray(case.ends)
    batch, heads = case.q.shape[:2]
    slots = int(max(ends.max(), 1))

    def host(side):
        def each(arrays):
            return tuple(None if a is None else np.asarray(a) for a in arrays)

        side = dataclasses.replace(
            side, words=each(side.words), scales=each(side.scales),
            offsets=each(side.offsets), tables=each(side.tables),
        )  # fmt: skip
        out = np.zeros((batch, heads, slots, side.reading.width))
        for b in range(batch):
            seen = (np.arange(slots) >= starts[b][:, None]) & (np.arange(slots) < ends[b][:, None])
            for s in np.flatnonzero(seen.any(axis=0)):
                for n in range(heads):
                    at = table[b, s // page] * case.pages.stride_page + n * case.pages.stride_head
                    out[b, n, s] = kernel_oracle.vector_at(side, n, int(at), int(s % page))
        return out

    s = np.arange(slots)
    seen = (s >= starts[..., None]) & (s < ends[..., None])
    return softmax(case.q, host(case.k), host(case.v), seen, **case.options)


def check(case: Any, partial, *, tolerance: str, want=None) -> None:
    """`kernel_cases.check` against the case's float64 softmax (`want`, if it is known)."""
    kernel_cases.check(case, partial, tolerance=tolerance, want=want or oracle(case))
