"""What every decode implementation takes and returns: plain arrays over flat head-pages.

A *head-page* is one page of one head: `rows` * 32 tokens (256 with 8 rows, 64 with 2) of
`numbers.packing`. All head-pages of a buffer lie along one axis R, and that of (sequence b, head n,
page p) is

    pages.table[b, p] * pages.stride_page + n * pages.stride_head

so the contiguous cache [B, N, P, ...] and a pool [pages, N, ...] are read by the same kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from turboq.codecs.reading import Reading
from turboq.numbers.packing import WORD_BITS


class Coded(NamedTuple):
    """Scales kept as codes: words uint32 [R, bits, rows, 1], table float32 [N, 2**bits]."""

    words: Any
    table: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Stored K, or stored V, of the N heads of one group: one entry per part of `reading`.

    words    uint32 [R, bits, rows, width]
    scales   float16, bfloat16 or float32 [R, page], or None (scale 1); for a GPU also `Coded`
    offsets  likewise, or None (offset 0)
    tables   float32 [N, 2**bits] ascending for levels "table", else None

    What lies in slots that no query row sees is arbitrary and must not reach the result: NaN
    scales and offsets, any code (the NaN codes of e4m3 included).
    """

    words: tuple[Any, ...]
    scales: tuple[Any, ...]
    offsets: tuple[Any, ...]
    tables: tuple[Any, ...]
    reading: Reading = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.words[0].shape[-2]

    @property
    def page(self) -> int:
        """Tokens per page."""
        return self.rows * WORD_BITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Where the head-page of (b, n, p) lies: table[b, p] * stride_page + n * stride_head.

    Entries past a sequence's last page may hold any page of the buffer (0 by custom) or -1: kernels
    may read some page for them, and use nothing of it. `contiguous` promises table[b, p] = b*N*P +
    p, stride_page 1, stride_head P.
    """

    table: Any  # int32 [B, P]
    stride_page: int = dataclasses.field(metadata={"static": True})
    stride_head: int = dataclasses.field(metadata={"static": True})
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})


def contiguous_pages(batch: int, heads: int, pages: int) -> Pages:
    """The pages of buffers [B, N, P, ...] flattened to [B * N * P, ...]."""
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * (heads * pages)
    table = first + jnp.arange(pages, dtype=jnp.int32)[None, :]
    return Pages(table=table, stride_page=1, stride_head=pages, contiguous=True)


def pool_pages(table: Any, heads: int) -> Pages:
    """The pages of a pool [pages, N, ...] flattened to [pages * N, ...]; table int32 [B, P]."""
    return Pages(table=table, stride_page=heads, stride_head=1)


def whole_table(pages: Pages, count: int) -> Int[Array, "B _"]:
    """The page table of `count` entries a sequence, times the stride of pages, none of them -1.

    What is added for whole steps lies behind every length.
    """
    table = pages.table if pages.contiguous else jnp.maximum(pages.table, 0)
    room = ((0, 0), (0, count - table.shape[1]))
    return jnp.pad(table * pages.stride_page, room, mode="edge")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial:
    """One softmax over a part of the tokens, not yet normalised, for each query row.

    top [B, N, M] the largest logit seen; total [B, N, M] sum of exp(logit - top); acc [B, N, M, C]
    sum of exp(logit - top) value. A row that saw nothing has total 0 and acc 0; its top is then
    arbitrary (but not NaN).
    """

    acc: Any
    top: Any
    total: Any
