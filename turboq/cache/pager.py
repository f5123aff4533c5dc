"""Pages shared by sequences: who owns which page of a pool, on the host, without any array of JAX.

A pool has a fixed number of pages, each with room for `page` tokens of all layers and heads (one
page number means the same page in every layer's buffers). A sequence is a list of pages; sequences
that share a prefix share its pages, counted by reference. A page with more than one owner is never
written: the writer takes a copy first (copy-on-write), which only happens to a last, partly filled
page. Exact sinks and recent tokens are small and live in one *row* per sequence.

Layers with sliding windows have pools of their own, one per window: of a sequence they hold the
pages that its next token's window reaches. Pages before are given up when the next step is planned.

The pager only keeps books. `plan` says what a step will write where, and which pages and rows the
device has to copy first (`turboq.cache.paged` does both).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE_ROWS

# Makes room in a pager until `enough()`, sparing the sequences `keep`.
Evict = Callable[["Pager", Callable[[], bool], frozenset[int]], None]


class PoolFull(TurboqError):
    """No page or row is free, and evicting did not help."""


class PagePool:
    """Reference counts of a fixed number of pages (or rows)."""

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"{count=} must be at least 1")
        self.counts = np.zeros(count, np.int64)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page, with one owner.

        Raises:
          PoolFull: none is free.
        """
        if not self._free:
            raise PoolFull(f"all {len(self.counts)} pages are in use")
        page = self._free.pop()
        self.counts[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more owner of a page in use."""
        if self.counts[page] < 1:
            raise ValueError(f"{page=} is free and cannot be shared")
        self.counts[page] += 1
        return page

    def release(self, page: int) -> None:
        """One owner less; the last one frees it."""
        if self.counts[page] < 1:
            raise ValueError(f"{page=} is free already")
        self.counts[page] -= 1
        if not self.counts[page]:
            self._free.append(page)


@dataclasses.dataclass
class _Held:
    """A sequence's pages in one pool, behind the first ones, which were given up."""

    pages: list[int]
    given_up: int = 0


@dataclasses.dataclass
class _Sequence:
    held: tuple[_Held, ...]  # one per pool
    row: int
    length: int
    used: int  # the pager's clock when it was last touched


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Where the next tokens of some sequences go: int32 arrays for the device.

    Of each pool a table [B, P], the pages of each sequence from its first token on (0 where it has
    none); rows [B], starts [B] tokens present before, counts [B] tokens that are added, room [B]
    slots up to the end of each one's pages. `copies` (of each pool) and `rows_copied` [n, 2] are
    (from, to) copies that must happen before anything of this step is written, all reads before all
    writes.
    """

    tables: tuple[np.ndarray, ...]
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    room: np.ndarray
    copies: tuple[np.ndarray, ...]
    rows_copied: np.ndarray

    @property
    def table(self) -> np.ndarray:
        """Of the first pool."""
        return self.tables[0]

    @property
    def pages_copied(self) -> np.ndarray:
        """In the first pool."""
        return self.copies[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolReport:
    """What a pool holds, in pages and token slots.

    `shared` pages have more than one owner; `saved` is how many pages sequences would need more if
    none were shared. `tokens` counts every sequence's tokens on them, `slots` distinct filled ones.
    """

    page: int
    pages: int
    active: int
    shared: int
    saved: int
    sequences: int
    tokens: int
    slots: int

    @property
    def fragmentation(self) -> float:
        """Share of the slots of active pages that hold no token; 0 for an empty pool."""
        return 1 - self.slots / (self.active * self.page) if self.active else 0.0


class Pager:
    """Sequences over one pool of pages, or one per window.

    Args:
      pages: pages of the pool, or of each.
      windows: of each pool the tokens that a query sees at most, its own included; None: all.
      page: tokens per page, 256 or 64.
      rows: how many sequences may be alive at once.
      per_sequence: pages a sequence may have (the width of a page table).
      recent: exact tokens that each row's ring holds (`KVLayer.ring`). A ring knows only the last
        tokens, so with one a sequence is forked at its end only and never truncated.
      evict: called as evict(pager, enough, keep) when pages or rows are needed and not free; it
        may `drop` sequences (not those in `keep`) until `enough()`. Without it, and where it does
        not help, `PoolFull` is raised.

    Raises:
      ValueError: a count that is not positive or an unknown page size.
    """

    def __init__(
        self,
        *,
        pages: int | Sequence[int],
        rows: int,
        per_sequence: int,
        page: int = 256,
        recent: int = 0,
        windows: Sequence[int | None] = (None,),
        evict: Evict | None = None,
    ):
        counts = (pages,) if isinstance(pages, int) else tuple(pages)
        if len(counts) != len(windows):
            raise ValueError(f"{pages=} must be one number for each of {windows=}")
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"{windows=} must be at least 1 token, or None")
        if page not in PAGE_ROWS:
            raise ValueError(f"{page=} must be one of {tuple(PAGE_ROWS)}")
        if per_sequence < 1:
            raise ValueError(f"{per_sequence=} must be at least 1")
        self.page, self.per_sequence, self.recent, self.evict = page, per_sequence, recent, evict
        self.windows = tuple(windows)
        self.pools, self.row_pool = tuple(map(PagePool, counts)), PagePool(rows)
        self._sequences: dict[int, _Sequence] = {}
        self._next = self._clock = 0
        # Copies the device still owes, by target: their sources are what the device holds now.
        self._pages_copied: list[dict[int, int]] = [{} for _ in counts]
        self._rows_copied: dict[int, int] = {}

    @property
    def pool(self) -> PagePool:
        """The first pool."""
        return self.pools[0]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Names of the living sequences, the one that was used longest ago first."""
        return tuple(sorted(self._sequences, key=lambda i: self._sequences[i].used))

    def length(self, name: int) -> int:
        """Tokens of a sequence, those of planned steps included."""
        return self._get(name).length

    def pages_of(self, name: int, pool: int = 0) -> tuple[int, ...]:
        """Pages of a sequence in one pool, in order, behind those given up."""
        return tuple(self._get(name).held[pool].pages)

    def create(self) -> int:
        """A new, empty sequence.

        Raises:
          PoolFull: no row is free.
        """
        self._make_room([0] * len(self.pools), 1)
        row = self.row_pool.take()
        self._rows_copied.pop(row, None)  # what was owed to its last owner is void
        held = tuple(_Held(pages=[]) for _ in self.pools)
        return self._add(_Sequence(held=held, row=row, length=0, used=0))

    def fork(self, name: int, length: int | None = None) -> int:
        """A new sequence that begins with the first `length` tokens of `name` (default: all).

        No token is copied: it shares the pages.

        Raises:
          PoolFull: no row is free.
          TurboqError: `length` is not in 0..length(name), or below it although there is a ring or
            its window has been given up.
        """
        parent = self._get(name)
        length = parent.length if length is None else length
        self._check_cut(name, length)
        self._make_room([0] * len(self.pools), 1, (name,))
        row = self.row_pool.take()
        self._rows_copied[row] = self._rows_copied.get(parent.row, parent.row)
        held = tuple(
            _Held(
                pages=[pool.share(p) for p in own.pages[: self._pages(length) - own.given_up]],
                given_up=own.given_up,
            )
            for pool, own in zip(self.pools, parent.held, strict=True)
        )
        return self._add(_Sequence(held=held, row=row, length=length, used=0))

    def truncate(self, name: int, length: int) -> None:
        """Forgets the tokens from `length` on (rejected speculation) and frees their pages.

        Raises:
          TurboqError: `length` is not in 0..length(name), or below it although there is a ring or
            its window has been given up.
        """
        self._check_cut(name, length)
        sequence = self._get(name)
        for pool, own in zip(self.pools, sequence.held, strict=True):
            keep = self._pages(length) - own.given_up
            for page in own.pages[keep:]:
                pool.release(page)
            del own.pages[keep:]
        sequence.length = length

    def drop(self, name: int) -> None:
        """Ends a sequence; pages that nobody else has become free."""
        sequence = self._sequences.pop(self._check(name))
        for pool, own in zip(self.pools, sequence.held, strict=True):
            for page in own.pages:
                pool.release(page)
        self.row_pool.release(sequence.row)

    def plan(self, names: Sequence[int], counts: Sequence[int]) -> Step:
        """Makes room for `counts[i]` more tokens of each sequence and says where they go.

        All or nothing: after an error no sequence has changed but for pages that no window reaches
        any more (and some may have been evicted).

        Raises:
          PoolFull: too few pages are free.
          TurboqError: a sequence would outgrow its page table, or is named twice.
        """
        if len(set(names)) != len(names):
            raise TurboqError(f"sequences of one step must differ: {list(names)}")
        for name, count in zip(names, counts, strict=True):
            room = self.per_sequence * self.page
            if count < 0 or self._get(name).length + count > room:
                raise TurboqError(
                    f"{self.length(name)} + {count} tokens do not fit a page table of"
                    f" {self.per_sequence} pages ({room} tokens)"
                )
        for name in names:
            self._give_up(self._get(name))
        self._make_room(self._missing(names, counts), 0, names)
        self._clock += 1
        starts = [self._extend(self._get(n), c) for n, c in zip(names, counts, strict=True)]
        tables = tuple(np.zeros((len(names), self.per_sequence), np.int32) for _ in self.pools)
        for i, name in enumerate(names):
            for table, own in zip(tables, self._get(name).held, strict=True):
                table[i, own.given_up : own.given_up + len(own.pages)] = own.pages
        ends = [self._pages(self.length(name)) for name in names]
        return Step(
            tables=tables,
            rows=np.array([self._get(name).row for name in names], np.int32),
            starts=np.array(starts, np.int32),
            counts=np.array(counts, np.int32),
            room=np.array(ends, np.int32) * self.page,
            copies=tuple(map(_paid, self._pages_copied)),
            rows_copied=_paid(self._rows_copied),
        )

    def report(self, pool: int = 0) -> PoolReport:
        """What a pool holds now."""
        counts = self.pools[pool].counts
        filled, tokens = np.zeros(len(counts), np.int64), 0
        for sequence in self._sequences.values():
            own = sequence.held[pool]
            tokens += sequence.length - own.given_up * self.page
            for i, page in enumerate(own.pages, own.given_up):
                filled[page] = max(filled[page], min(sequence.length - i * self.page, self.page))
        return PoolReport(
            page=self.page,
            pages=len(counts),
            active=int(np.sum(counts > 0)),
            shared=int(np.sum(counts > 1)),
            saved=int(np.sum(np.maximum(counts - 1, 0))),
            sequences=len(self._sequences),
            tokens=tokens,
            slots=int(filled.sum()),
        )

    def check(self) -> None:
        """Recounts every owner.

        Raises:
          TurboqError: the books are wrong: a leaked page or row, or one owned without a count.
        """
        living = self._sequences.values()
        for what, pool, owned in (
            *(
                ("pages", pool, [p for s in living for p in s.held[i].pages])
                for i, pool in enumerate(self.pools)
            ),
            ("rows", self.row_pool, [s.row for s in living]),
        ):
            want = np.bincount(np.array(owned, np.int64), minlength=len(pool.counts))
            wrong = np.flatnonzero(want != pool.counts)
            if len(wrong) or pool.free != int(np.sum(want == 0)):
                raise TurboqError(f"{what} {wrong.tolist()} are counted wrongly")

    def _pages(self, length: int) -> int:
        return -(-length // self.page)

    def _check(self, name: int) -> int:
        if name not in self._sequences:
            raise TurboqError(f"no sequence {name}: it was dropped, evicted or never created")
        return name

    def _check_cut(self, name: int, length: int) -> None:
        tokens = self._get(name).length
        if not 0 <= length <= tokens:
            raise TurboqError(f"{length=} must be 0..{tokens}, the tokens of sequence {name}")
        if 0 < length < tokens and self.recent:
            raise TurboqError(
                f"{length=} must be {tokens}, the end of sequence {name}: its ring of {self.recent}"
                " exact recent tokens cannot be turned back"
            )
        for window, own in zip(self.windows, self._get(name).held, strict=True):
            if window is not None and self._reached(window, length) < own.given_up:
                raise TurboqError(
                    f"{length=} of sequence {name}: the window of {window} tokens before it begins"
                    f" before token {own.given_up * self.page}, the first that is still held"
                )

    def _reached(self, window: int, length: int) -> int:
        """The first page that a query at position `length` sees."""
        return max(length - window + 1, 0) // self.page

    def _give_up(self, sequence: _Sequence) -> None:
        """Releases the pages that no window of the next queries reaches."""
        for window, pool, own in zip(self.windows, self.pools, sequence.held, strict=True):
            while window is not None and own.given_up < self._reached(window, sequence.length):
                pool.release(own.pages.pop(0))
                own.given_up += 1

    def _get(self, name: int) -> _Sequence:
        return self._sequences[self._check(name)]

    def _add(self, sequence: _Sequence) -> int:
        self._clock += 1
        sequence.used = self._clock
        name, self._next = self._next, self._next + 1
        self._sequences[name] = sequence
        return name

    def _missing(self, names: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Pages of each pool that these sequences need more than they have."""
        out = []
        for i, pool in enumerate(self.pools):
            total, writers = 0, collections.Counter()
            for name, count in zip(names, counts, strict=True):
                sequence = self._get(name)
                own = sequence.held[i]
                total += self._pages(sequence.length + count) - own.given_up - len(own.pages)
                if count and sequence.length % self.page:
                    writers[own.pages[-1]] += 1
            # Of a page's owners, all that write but one need a copy; all, if one does not write.
            out.append(total + sum(min(n, int(pool.counts[p]) - 1) for p, n in writers.items()))
        return out

    def _extend(self, sequence: _Sequence, count: int) -> int:
        start = sequence.length
        sequence.length, sequence.used = start + count, self._clock
        for pool, own, owed in zip(self.pools, sequence.held, self._pages_copied, strict=True):
            if count and start % self.page and pool.counts[own.pages[-1]] > 1:
                old, new = own.pages[-1], pool.take()
                pool.release(old)
                owed[new] = old
                own.pages[-1] = new
            while own.given_up + len(own.pages) < self._pages(sequence.length):
                own.pages.append(pool.take())
        return start

    def _make_room(self, pages: list[int], rows: int, keep: Sequence[int] = ()) -> None:
        def enough() -> bool:
            found = all(n <= pool.free for n, pool in zip(pages, self.pools, strict=True))
            return found and rows <= self.row_pool.free

        if self.evict is not None and not enough():
            self.evict(self, enough, frozenset(keep))
            for name in keep:
                self._check(name)
        for need, pool, window in zip(pages, self.pools, self.windows, strict=True):
            if need > pool.free:
                which = "" if window is None else f" of layers with a window of {window}"
                raise PoolFull(
                    f"{need} pages of {self.page} tokens{which} are needed and {pool.free} of"
                    f" {len(pool.counts)} are free: drop sequences or make a larger pool"
                )
        if rows > self.row_pool.free:
            raise PoolFull(f"all {len(self.row_pool.counts)} sequences are in use: drop one")


def drop_least_recent(pager: Pager, enough: Callable[[], bool], keep: frozenset[int]) -> None:
    """An eviction hook: drops the sequences used longest ago until there is enough room."""
    for name in pager.sequences:
        if enough():
            return
        if name not in keep:
            pager.drop(name)


def _paid(owed: dict[int, int]) -> np.ndarray:
    """All copies owed, as [n, 2] (from, to); none is left."""
    copies = np.array([(a, b) for b, a in owed.items() if a != b], np.int32).reshape(-1, 2)
    owed.clear()
    return copies
