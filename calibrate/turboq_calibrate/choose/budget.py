"""What a plan may use, as people say it, and what that leaves for the choice of codecs.

    4680B            bytes of one more token, all layers (also KiB, kB, MiB, MB, GiB, GB)
    3.25bpc          bits per channel of one more token: stored bits over sum of head dims
    131072@4GiB      everything in memory for one sequence of 131072 tokens
    131072x8@40GiB   the same for eight sequences
    1.75..4bpc       every budget per token between two: a ladder of plans

The last two count what `cache.accounting.residency` counts: whole pages (of a sliding window those
that it needs), exact sinks and recent tokens, fitted arrays, static tables.
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from turboq.cache import accounting, composed
from turboq.cache.layer import EXACT_DTYPES, TokenPolicy
from turboq.cache.windows import pages_held
from turboq.codecs import Codec
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE
from turboq_calibrate.choose.solver.problem import Problem

_UNITS = {
    "b": 1,
    **{f"{p}ib": 2 ** (10 * (i + 1)) for i, p in enumerate("kmgt")},
    **{f"{p}b": 10 ** (3 * (i + 1)) for i, p in enumerate("kmgt")},
}
_NUMBER = r"(\d+(?:\.\d+)?)"
_BYTES = _NUMBER + r"\s*((?:[kmgt]i?)?b)"
_PER_TOKEN = re.compile(_BYTES + r"(?:\s*/\s*token)?", re.IGNORECASE)
_BPC = re.compile(_NUMBER + r"\s*bpc", re.IGNORECASE)
_CONTEXT = re.compile(r"(?:context\s+)?(\d+)(?:x(\d+))?\s*(?:@|in)\s*" + _BYTES, re.IGNORECASE)
_RANGE = re.compile(_NUMBER + r"\s*\.\.\s*(" + _NUMBER + r"\s*(bpc|(?:[kmgt]i?)?b))", re.IGNORECASE)
_HELP = "4680B (per token), 3.25bpc or 131072@4GiB (context, or 131072x8@40GiB of 8 sequences)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit: `nbytes` per token, `bpc`, or `nbytes` in all at `context` tokens x `batch`.

    `bpc` is bits per channel of one more token: all stored bits over the sum of head dims.

    Raises:
      ValueError: both or neither of bytes and bits.
      TurboqError: nothing, or no token or sequence.

    Examples:
      >>> from turboq_calibrate import Budget
      >>> Budget.parse("3.25bpc").bpc, Budget.parse("4680B").nbytes
      (Fraction(13, 4), Fraction(4680, 1))
      >>> Budget.parse("131072x8@40GiB").context, Budget.parse("131072x8@40GiB").batch
      (131072, 8)
    """

    text: str
    nbytes: Fraction | None = None
    bpc: Fraction | None = None
    context: int | None = None
    batch: int = 1

    def __post_init__(self):
        if (self.nbytes is None) == (self.bpc is None):
            raise ValueError(f"budget {self.text!r} must be bytes or bits per channel")
        if self.context is not None and (self.context < 1 or self.batch < 1):
            raise TurboqError(f"budget {self.text!r}: at least 1 token and 1 sequence")
        if not (self.nbytes or self.bpc):
            raise TurboqError(f"budget {self.text!r} must be more than nothing")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from a flag; see the module.

        Raises:
          TurboqError: none of the forms.
        """
        value = text.strip()
        if found := _CONTEXT.fullmatch(value):
            tokens, batch, number, unit = found.groups()
            return cls(
                text=value,
                nbytes=_nbytes(number, unit),
                context=int(tokens),
                batch=int(batch or 1),
            )
        if found := _PER_TOKEN.fullmatch(value):
            return cls(text=value, nbytes=_nbytes(*found.groups()))
        if found := _BPC.fullmatch(value):
            return cls(text=value, bpc=Fraction(found[1]))
        raise TurboqError(f"budget {text!r} is none of {_HELP}")

    @classmethod
    def parse_range(cls, text: str) -> tuple[Budget, Budget] | None:
        """The lower and the upper budget of LOW..HIGH; None for a single budget.

        Raises:
          TurboqError: LOW is not below HIGH.
        """
        found = _RANGE.fullmatch(text.strip())
        if found is None:
            return None
        low, high = cls.parse(found[1] + found[4]), cls.parse(found[2])
        if Fraction(found[1]) >= Fraction(found[3]):
            raise TurboqError(f"budget {text!r}: {low.text} must be less than {high.text}")
        return low, high

    def bits(self, channels: int) -> int:
        """Whole bits of one token that a budget per token allows."""
        if self.bpc is not None:
            return int(self.bpc * channels)
        if self.nbytes is None or self.context is not None:
            raise ValueError(f"budget {self.text!r} is not per token")
        return int(self.nbytes * 8)

    def bits_near(self, channels: Mapping[int | None, int], arrays: int = 0) -> int:
        """The same, also at a context, where exact tokens are not taken off.

        `channels` of the layers of every window; `arrays`: bytes that fitted arrays take at most.
        At a context it is bits of a token that all keep.
        """
        total = sum(channels.values())
        if self.context is None:
            return self.bits(total)
        numbers = sum(_tokens(self, window) * n for window, n in channels.items())
        return int(max((self.nbytes or 0) - arrays, 0) * 8 * total / numbers)


def middle(low: Budget, high: Budget) -> Budget:
    """Half way between two budgets per token of one unit."""
    if low.bpc is not None and high.bpc is not None:
        bpc = (low.bpc + high.bpc) / 2
        return Budget(text=f"{float(bpc):g}bpc", bpc=bpc)
    if low.nbytes is None or high.nbytes is None or low.context or high.context:
        raise ValueError(f"{low.text} and {high.text} must be budgets per token of one unit")
    nbytes = (low.nbytes + high.nbytes) / 2
    return Budget(text=f"{float(nbytes):g}B", nbytes=nbytes)


def _tokens(budget: Budget, window: int | None) -> int:
    """Token slots of all sequences at the budget's context."""
    assert budget.context is not None
    return budget.batch * pages_held(window, accounting.capacity(budget.context)) * PAGE


def _nbytes(number: str, unit: str) -> Fraction:
    return Fraction(number) * _UNITS[unit.lower()]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at a context: `codes` [U, C] of every candidate's pages, `sizes` with the least that
    its fitted arrays take, and `fixed` (sinks and recent tokens, whatever is chosen)."""

    codes: Int[np.ndarray, "U C"]
    sizes: Int[np.ndarray, "U C"]
    fixed: int
    policy: TokenPolicy

    @classmethod
    def of(cls, problem: Problem, budget: Budget, policy: TokenPolicy) -> Memory:
        """Raises TurboqError for a codec that stores blocks of tokens: its layer's exact ring
        depends on what stands beside it."""
        assert budget.context is not None
        for row in problem.codecs:
            for codec in row:
                if codec.block != 1:
                    raise TurboqError(f"codec {codec.name} stores blocks: name a budget per token")
        tokens = np.array([_tokens(budget, window) for window in problem.windows], np.int64)
        exact = {name: 4 if name == "float32" else 2 for name in EXACT_DTYPES}[policy.exact_dtype]
        kept = budget.batch * (policy.sinks + policy.recent) * exact * problem.channels
        # Capacity is whole pages of 256 tokens, so bits of a token times it are whole bytes.
        codes = problem.sizes * (tokens // 8)[:, None]
        return cls(codes, codes + _arrays(problem), kept, policy)

    def used(self, problem: Problem, chosen: Int[np.ndarray, "U"]) -> int:
        """Bytes of a choice: also arrays and static tables, which depend on the whole of it."""
        layers = problem.layers(chosen, self.policy)
        codes = int(self.codes[np.arange(len(chosen)), chosen].sum())
        arrays = accounting.array_bytes(layers) + accounting.table_bytes(layers)
        return codes + self.fixed + arrays


def _arrays(problem: Problem) -> Int[np.ndarray, "U C"]:
    """Bytes of fitted arrays that a candidate has at least: its own, or where heads are joined its
    coordinates' part of both turns (`turboq.cache.composed`)."""
    joined = np.zeros(len(problem.units), np.int64)
    if problem.joint_heads is not None:
        dims: dict[int, dict[str, int]] = {}
        for unit, dim in zip(problem.units, problem.dims.tolist(), strict=True):
            dims.setdefault(unit.layer, {})[unit.side] = dim
        joined[:] = [problem.joint_heads * sum(dims[u.layer].values()) for u in problem.units]

    def of(codec: Codec, together: int) -> int:
        if not together:
            return 4 * sum(math.prod(shape) for shape in codec.array_shapes.values())
        return 2 * together * composed.width(codec)  # int8

    return np.array(
        [
            [of(codec, together) for codec in row]
            for row, together in zip(problem.codecs, joined.tolist(), strict=True)
        ],
        np.int64,
    )
