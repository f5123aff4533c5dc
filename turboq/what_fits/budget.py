"""What fits in a memory: weights, working memory, allocator overhead and the cache.

    needed(context, sessions) = weights + working + (1 + overhead) * (cache + states) + tables

Everything is monotone in context and in sessions, so the largest that fits is found by bisection
of the very function that is printed: no second formula can disagree with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from turboq.errors import TurboqError
from turboq.what_fits.sizes import Cache

GIB = 2**30
CARDS = (8, 16, 24, 32, 48, 80)  # GB as cards are sold, which are GiB
UNLIMITED = 2**40  # tokens or sessions that no memory bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """One way of storing the cache, and everything else that takes memory.

    Args:
      cache: a view of the cache (`turboq.what_fits.sizes`).
      sessions: sequences held at once.
      prefix: first tokens that all sessions have in common and store once.
      weights, working: bytes of weights and of activations, buffers and runtime.
      state: bytes of recurrent state per session.
      overhead: allocator's share on top of cache and states (0.02 is 2 %).

    Raises:
      ValueError: a negative value, or no session.
    """

    cache: Cache
    sessions: int = 1
    prefix: int = 0
    weights: int = 0
    working: int = 0
    state: int = 0
    overhead: float = 0.0

    def __post_init__(self):
        if self.sessions < 1:
            raise ValueError(f"{self.sessions=} must be at least 1")
        for name in ("prefix", "weights", "working", "state", "overhead"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more")

    @property
    def fixed(self) -> int:
        """Bytes without any token."""
        return self.weights + self.working

    def needed(self, context: int, sessions: int | None = None) -> int:
        """Bytes for `sessions` (default: the budget's) of `context` tokens each."""
        count = self.sessions if sessions is None else sessions
        held = self.cache.kv_bytes(context, count, self.prefix) + count * self.state
        return self.fixed + held + math.ceil(held * self.overhead) + self.cache.fixed_bytes

    def max_context(self, memory: int) -> int | None:
        """Most tokens that every session can have in `memory` bytes; None: no limit.

        Whole pages of the cache's view, as its last page is paid for in any case.

        Raises:
          TurboqError: weights and working memory alone do not fit.
        """
        self.check(memory)
        page = self.cache.page_tokens
        pages = largest(lambda n: self.needed(n * page) <= memory)
        return None if pages is None else pages * page

    def max_sessions(self, memory: int, context: int) -> int | None:
        """Most sessions of `context` tokens in `memory` bytes; None: no limit.

        Raises:
          TurboqError: weights and working memory alone do not fit.
        """
        self.check(memory)
        return largest(lambda n: self.needed(context, n) <= memory)

    def check(self, memory: int) -> None:
        """Raises TurboqError unless weights and working memory leave room."""
        if memory < 0:
            raise TurboqError(f"memory of {memory} bytes must be 0 or more")
        if self.fixed and self.fixed >= memory:
            raise TurboqError(
                f"weights ({self.weights / GIB:.2f} GiB) and working memory "
                f"({self.working / GIB:.2f} GiB) leave nothing of {memory / GIB:.2f} GiB for the "
                "cache: more memory (--memory_gib), or smaller weights (--weights, --weights_gib)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One row of the card table; None in `max_context` and `sessions`: no limit."""

    gib: int | float
    fits: bool  # the weights
    max_context: int | None
    sessions: int | None


def card_table(budget: Budget, context: int, cards: tuple[int | float, ...] = CARDS) -> list[Card]:
    """Longest context, and sessions at `context`, for every size of memory."""
    rows = []
    for gib in cards:
        memory = int(gib * GIB)
        if budget.fixed and budget.fixed >= memory:
            rows.append(Card(gib=gib, fits=False, max_context=0, sessions=0))
            continue
        longest, sessions = budget.max_context(memory), budget.max_sessions(memory, context)
        rows.append(Card(gib=gib, fits=True, max_context=longest, sessions=sessions))
    return rows


def largest(fits: Callable[[int], bool]) -> int | None:
    """The largest n >= 0 that fits, 0 if 1 does not, None if `UNLIMITED` does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if low >= UNLIMITED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
