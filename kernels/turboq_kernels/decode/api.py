"""Dispatch of the decode kernels: which implementation reads the stored tokens."""

from __future__ import annotations

import functools
import importlib

import jax
from jaxtyping import Array, Float, Int

from turboq_kernels.decode.types import Pages, Partial, Side

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "triton")
_MODULES = {
    "xla": "turboq_kernels.decode.base",
    "mosaic_tpu": "turboq_kernels.decode.mosaic_tpu",
    "triton": "turboq_kernels.decode.triton",
}
# What None tries, in order, by the platform that runs the arrays.
_PREFERENCE = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("triton", "xla"), "cpu": ("xla",)}


@functools.partial(
    jax.jit,
    static_argnames=("scale", "softcap", "splits", "implementation", "interpret", "block_tokens"),
)
def decode(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    bias: Float[Array, "B N M"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    splits: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    block_tokens: int | None = None,
) -> Partial:
    """Attention of M query rows per sequence and KV head over the *stored* tokens they may see.

    Row m of sequence b sees the slots starts[b, m] <= s < ends[b, m] (causality, sinks, windows and
    speculative tokens are all in these two numbers; ends <= starts sees nothing):

        logit = cap(scale * (q . k_s + bias)),  cap(x) = softcap * tanh(x / softcap)
        acc   = sum_s exp(logit_s - top) v_s,   values in the parts' coordinates

    The rows of a KV head are its T query tokens times G query heads, in any order. `q` is folded
    (`Codec.reading_query`), `bias` the query's offset (only stored tokens lack their mean).
    Exact tokens and logit sinks are merged afterwards (`turboq_kernels.merge`).

    Args:
      pages: page table; all buffers of `k` and `v` share it.
      splits: parts of the sequence that run in parallel, None for the implementation's choice.
      implementation: a name of `IMPLEMENTATIONS` never falls back; None takes the first that
        supports the case on the present platform.
      interpret: run the named Pallas kernel in interpret mode (for tests on a CPU).
      block_tokens: tokens that "xla" unpacks at a time (other implementations choose themselves).

    Raises:
      ValueError: shapes that do not match, an unknown implementation, or a named one that does not
        support the case (the message says why).
      ImportError: this JAX lacks the backend that the platform's kernel is written in.
    """
    check(q, k, v, pages, starts, ends)
    name = choose(q, k, v, pages, implementation, interpret)
    module = importlib.import_module(_MODULES[name])
    options = {"block_tokens": block_tokens} if name == "xla" else {"interpret": interpret}
    return module.decode(
        q, k, v, pages, starts, ends,
        bias=bias, scale=scale, softcap=softcap, splits=splits, **options,
    )  # fmt: skip


def choose(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    implementation: str | None,
    interpret: bool = False,
) -> str:
    """The implementation that `decode` takes.

    Raises:
      ValueError: unknown, or named and not able to.
    """
    if implementation is None:
        if interpret:
            raise ValueError(f"{interpret=} needs a named implementation: 'mosaic_tpu' or 'triton'")
        order = _PREFERENCE.get(jax.default_backend(), ("xla",))
        return next(name for name in order if unsupported(name, q, k, v, pages) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    reason = unsupported(implementation, q, k, v, pages)
    if reason is not None:
        raise ValueError(f"{implementation=} cannot run this case: {reason}; use 'xla' or None")
    return implementation


def unsupported(
    name: str, q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages
) -> str | None:
    """Why an implementation cannot run a case, or None."""
    if name == "xla":
        return None
    # A JAX without the backend raises: nothing falls to XLA on a GPU without a word.
    return importlib.import_module(_MODULES[name]).unsupported(q, k, v, pages)


def check(q, k: Side, v: Side, pages: Pages, starts, ends) -> None:
    """Refuses shapes that do not match, for every kernel over stored tokens."""
    batch, heads, m, width = q.shape
    if width != k.reading.width:
        raise ValueError(f"q has {width} coordinates, the keys {k.reading.width}")
    if k.page != v.page:
        raise ValueError(f"pages of K and V differ: {k.page} and {v.page} tokens")
    if pages.table.shape[0] != batch or starts.shape != (batch, m) or ends.shape != (batch, m):
        raise ValueError(
            f"{pages.table.shape=}, {starts.shape=} and {ends.shape=} must be [B, P], [B, M] and"
            f" [B, M] with B={batch}, M={m}"
        )
    for side in (k, v):
        for part, words, table in zip(side.reading.parts, side.words, side.tables, strict=True):
            if words.shape[1:] != (part.bits, side.rows, part.width):
                raise ValueError(
                    f"words of {part.field!r} {words.shape=} must be"
                    f" [R, {part.bits}, {side.rows}, {part.width}]"
                )
            if part.levels == "table" and (table is None or table.shape != (heads, 2**part.bits)):
                raise ValueError(f"{part.field!r} needs a level table [{heads}, {2**part.bits}]")
