"""What a kernel must know of a codec: runs of coordinates of equal width, and where scales lie.

Everything linear (rotation, transform, mean, per-coordinate scale) is folded into the query and the
output by the codec, in XLA. What is left of a stored vector is, for coordinate j of part i,

    value_ij = scale_i * level_i(code_ij) + offset_i        (scale 1 and offset 0 where not stored)
    K: q . x_hat  =  sum_ij  query_ij value_ij  + offset of the query     (`Codec.reading_query`)
    V: p @ x_hat  =  unfold_output(sum_s p_s value_s, mass)

with the parts' coordinates concatenated in order, C = sum of widths. The levels of a code are

    table   level_tables[i][code], ascending, 2**bits float32 of the head
    affine  code                                           0 .. 2**bits - 1
    sign    2 code - 1                                     bits = 1
    int8    the byte as a signed integer                   bits = 8
    e4m3    the byte as an OCP FP8 E4M3 number             bits = 8, 0x7F and 0xFF are NaN
    e5m2    the byte as an OCP FP8 E5M2 number             bits = 8

and those of every kind but "table" may carry one static gain per head, which is folded into the
query (K) or the sum (V) outside the kernel.
"""

from __future__ import annotations

import dataclasses

LEVELS = ("table", "affine", "sign", "int8", "e4m3", "e5m2")
_BITS = {"sign": 1, "int8": 8, "e4m3": 8, "e5m2": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One run of coordinates: the packed field of its codes, and fields of its scale and offset.

    `field` is a packed `Field` of this width and bits; `scale` and `offset` name raw fields of
    width 1 (several parts may share them), or None. `symmetric` promises of every head's table
    level(~code) = -level(code), as of a Lloyd-Max codebook of a symmetric density: a kernel may
    then do with half the work.

    Raises:
      ValueError: unknown levels, or bits that do not fit them.
    """

    field: str
    width: int
    bits: int
    levels: str
    scale: str | None = None
    offset: str | None = None
    symmetric: bool = False

    def __post_init__(self):
        if self.levels not in LEVELS:
            raise ValueError(f"{self.levels=} must be one of {LEVELS}")
        if not 1 <= self.bits <= 8 or self.bits != _BITS.get(self.levels, self.bits):
            raise ValueError(
                f"{self.bits=} must be {_BITS.get(self.levels, '1..8')} for {self.levels=}"
            )
        if self.symmetric and self.levels != "table":
            raise ValueError(f"{self.symmetric=} is said of tables, not of {self.levels=}")
        if self.width < 1:
            raise ValueError(f"{self.width=} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """All parts of a stored vector, in the order of the folded query's coordinates."""

    parts: tuple[Part, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("a reading needs at least one part")

    @property
    def width(self) -> int:
        """C, coordinates of the folded query and of the weighted sum."""
        return sum(part.width for part in self.parts)

    @property
    def starts(self) -> tuple[int, ...]:
        """First coordinate of every part."""
        return tuple(sum(p.width for p in self.parts[:i]) for i in range(len(self.parts)))

    @property
    def bits_per_token(self) -> int:
        """Stored bits of the codes of one vector (scales not counted)."""
        return sum(part.width * part.bits for part in self.parts)
