"""Books of a page pool: owners, copy-on-write, eviction, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboq.cache.pager import PagePool, Pager, PoolFull, drop_least_recent
from turboq.errors import TurboqError


def make(pages=8, rows=4, per_sequence=4, **options):
    return Pager(pages=pages, rows=rows, per_sequence=per_sequence, page=64, **options)


def test_pages_are_taken_as_tokens_come():
    pager = make()
    a, b = pager.create(), pager.create()
    step = pager.plan([a, b], [65, 64])
    assert [len(pager.pages_of(n)) for n in (a, b)] == [2, 1]
    np.testing.assert_array_equal(step.starts, [0, 0])
    np.testing.assert_array_equal(step.table[0, :2], pager.pages_of(a))
    assert not step.table[0, 2:].any()
    assert not step.table[1, 1:].any()
    assert step.table.dtype == np.int32
    assert len(set(pager.pages_of(a)) | set(pager.pages_of(b))) == 3
    assert len(set(step.rows)) == 2
    step = pager.plan([b, a], [1, 63])
    np.testing.assert_array_equal(step.starts, [64, 65])
    assert [len(pager.pages_of(n)) for n in (a, b)] == [2, 2]
    assert not len(step.pages_copied)
    assert not len(step.rows_copied)
    pager.check()


def test_a_fork_shares_pages_until_one_writes():
    pager = make()
    a = pager.create()
    pager.plan([a], [100])
    b = pager.fork(a)
    assert pager.pages_of(a) == pager.pages_of(b)
    report = pager.report()
    assert (report.active, report.shared, report.saved) == (2, 2, 2)
    assert (report.tokens, report.slots) == (200, 100)
    old = pager.pages_of(a)[1]
    step = pager.plan([a], [1])
    new = pager.pages_of(a)[1]
    np.testing.assert_array_equal(step.pages_copied, [[old, new]])
    assert pager.pages_of(b)[1] == old
    assert pager.pages_of(a)[0] == pager.pages_of(b)[0]
    rows = dict(step.rows_copied.tolist())
    assert rows == {int(pager.plan([a], [0]).rows[0]): int(pager.plan([b], [0]).rows[0])}
    # b is alone on its page now, and on whole pages nothing is copied.
    assert not len(pager.plan([b], [1]).pages_copied)
    pager.check()


def test_of_two_owners_in_one_step_one_keeps_the_page():
    pager = make(pages=2)
    a = pager.create()
    pager.plan([a], [10])
    b = pager.fork(a)
    step = pager.plan([a, b], [1, 1])  # needs one page more, not two
    assert len(step.pages_copied) == 1
    assert pager.pages_of(a) != pager.pages_of(b)
    pager.check()


def test_a_fork_may_end_inside_and_a_whole_page_is_never_copied():
    pager = make()
    a = pager.create()
    pager.plan([a], [128])
    b, c = pager.fork(a, 64), pager.fork(a, 30)
    step = pager.plan([b, c], [1, 1])
    assert step.pages_copied.tolist() == [[pager.pages_of(a)[0], pager.pages_of(c)[0]]]
    np.testing.assert_array_equal(step.starts, [64, 30])
    assert pager.pages_of(b)[0] == pager.pages_of(a)[0]
    assert pager.pages_of(b)[1] not in pager.pages_of(a)


def test_forks_of_forks_copy_the_row_that_exists():
    """The device has only the first row: both copies read it."""
    pager = make()
    a = pager.create()
    row = int(pager.plan([a], [3]).rows[0])
    b = pager.fork(a)
    c = pager.fork(b)
    pager.drop(b)
    step = pager.plan([c], [1])
    assert [row, int(step.rows[0])] in step.rows_copied.tolist()
    assert all(source == row for source, _ in step.rows_copied.tolist())


def test_truncate_frees_pages_and_leaves_others_theirs():
    pager = make()
    a = pager.create()
    pager.plan([a], [150])
    b = pager.fork(a)
    pager.truncate(a, 60)
    assert len(pager.pages_of(a)) == 1
    assert pager.length(b) == 150
    assert len(pager.plan([a], [1]).pages_copied) == 1  # the page is still b's, too
    pager.check()


def test_dropping_everything_leaves_nothing():
    pager = make()
    names = [pager.create()]
    pager.plan(names, [100])
    names += [pager.fork(names[0]) for _ in range(3)]
    for name in names:
        pager.drop(name)
    assert (pager.pool.free, pager.row_pool.free) == (8, 4)
    assert pager.report().fragmentation == 0.0
    pager.check()


def test_fragmentation_is_the_empty_share_of_active_pages():
    pager = make()
    a = pager.create()
    pager.plan([a], [96])
    assert pager.report().fragmentation == 1 - 96 / 128


def test_eviction_spares_the_sequences_of_the_step():
    pager = make(pages=3, evict=drop_least_recent)
    a, b = pager.create(), pager.create()
    pager.plan([a, b], [64, 64])
    pager.plan([a], [64])  # b was used longest ago
    assert pager.pool.free == 0
    pager.plan([a], [1])
    assert pager.sequences == (a,)
    with pytest.raises(TurboqError, match=f"no sequence {b}"):
        pager.length(b)
    with pytest.raises(PoolFull, match="1 pages of 64 tokens are needed and 0 of 3"):
        pager.plan([a], [64])
    pager.check()


def test_rows_are_evicted_too():
    pager = make(rows=1, evict=drop_least_recent)
    a = pager.create()
    b = pager.create()
    assert pager.sequences == (b,)
    with pytest.raises(PoolFull, match="all 1 sequences"):
        pager.fork(b)  # its parent must not go
    assert a != b


def test_a_failed_step_changes_nothing():
    pager = make(pages=2)
    a, b = pager.create(), pager.create()
    pager.plan([a], [64])
    with pytest.raises(PoolFull):
        pager.plan([a, b], [64, 64])
    assert (pager.length(a), pager.length(b), pager.pool.free) == (64, 0, 1)
    with pytest.raises(TurboqError, match="do not fit a page table of 4 pages"):
        pager.plan([a], [200])
    with pytest.raises(TurboqError, match="must differ"):
        pager.plan([a, a], [1, 1])
    pager.check()


def test_a_ring_is_not_turned_back():
    pager = make(recent=5)
    a = pager.create()
    pager.plan([a], [30])
    pager.fork(a)
    pager.fork(a, 0)
    for change in (lambda: pager.fork(a, 29), lambda: pager.truncate(a, 29)):
        with pytest.raises(TurboqError, match="ring of 5 exact recent tokens"):
            change()
    with pytest.raises(TurboqError, match=r"length=31 must be 0\.\.30"):
        pager.fork(a, 31)


def test_refuses_bad_pools():
    with pytest.raises(ValueError, match="page=128"):
        Pager(pages=1, rows=1, per_sequence=1, page=128)
    with pytest.raises(ValueError, match="per_sequence=0"):
        Pager(pages=1, rows=1, per_sequence=0)
    with pytest.raises(ValueError, match="count=0"):
        PagePool(0)
    pool = PagePool(1)
    page = pool.take()
    pool.release(page)
    with pytest.raises(ValueError, match="free already"):
        pool.release(page)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(page)


def test_check_notices_a_leak():
    pager = make()
    pager.pool.take()
    with pytest.raises(TurboqError, match="pages \\[0\\] are counted wrongly"):
        pager.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 90)), max_size=40))
def test_no_two_sequences_ever_write_one_page(operations):
    """Whatever happens, a page that a step writes has one owner, and the books balance."""
    pager = make(evict=drop_least_recent)
    for kind, pick, count in operations:
        names = pager.sequences
        if not names or kind == 0:
            pager.create()
            continue
        name = names[pick % len(names)]
        if kind == 1:
            pager.fork(name, min(count, pager.length(name))) if len(names) < 4 else None
        elif kind == 2:
            pager.drop(name)
        elif kind == 3:
            pager.truncate(name, pager.length(name) // 2)
        elif pager.length(name) + count <= 4 * 64:
            before = pager.length(name)
            try:
                pager.plan([name], [count])
            except PoolFull:
                assert pager.length(name) == before
                continue
            written = pager.pages_of(name)[before // 64 :]
            assert all(pager.pool.counts[p] == 1 for p in written)
        pager.check()
