"""What every encode kernel takes and returns."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float, Int, UInt32

from turboq.codecs.writing import WriteTables, Writing
from turboq_kernels.decode.types import Pages


class Write(Protocol):
    """Encodes x and writes its codes into the words of head-pages; row numbers are returned.

    Token t of sequence b goes to slot starts[b] + t of its pages if t < counts[b] (which the caller
    has limited to the room in `pages`); padding tokens may hold anything, NaN included. Of the
    words that the tokens touch, bits of slots below starts[b] are kept and those of later slots may
    become anything. Pages that no token touches are neither written nor changed: they may belong to
    other sequences, and the table's entries for them may be any page.

    words  one buffer [R, bits, rows, width] per `word_fields(writing)`, donated (aliased)
    tables leading axis N
    returns words, and one float32 [B, N, T] per `writing.rows` (rounded to `writing.dtype` or not;
            of padding tokens arbitrary)
    """

    def __call__(
        self,
        x: Float[Array, "B N T D"],
        writing: Writing,
        tables: WriteTables,
        words: tuple[UInt32[Array, "R _ r _"], ...],
        pages: Pages,
        starts: Int[Array, "B"],
        counts: Int[Array, "B"],
        *,
        interpret: bool = False,
    ) -> tuple[tuple[UInt32[Array, "R _ r _"], ...], tuple[Float[Array, "B N T"], ...]]: ...


def word_fields(writing: Writing) -> tuple[str, ...]:
    """Fields whose words a kernel writes: the parts' codes, then the sketch's signs."""
    names = tuple(part.field for part in writing.parts)
    return names if writing.signs is None else (*names, writing.signs)
