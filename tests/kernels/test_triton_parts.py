"""How the Triton kernels spread tokens over a GPU, and how their parts become one softmax."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from triton_cases import make, run

from turboq_kernels.decode import triton_parts
from turboq_kernels.target import H100_PROCESSORS, target


@pytest.mark.parametrize("processors", [108, 114, 132, 144])
@pytest.mark.parametrize("batch", [1, 8, 32, 64, 200])
def test_parts_fill_waves(processors, batch):
    """8 KV heads, 3 programs a multiprocessor, 256 steps: 90 % of all slots work (at 200, 80)."""
    heads, steps, slots = 8, 256, 3 * processors
    parts = triton_parts.count(batch, heads, steps, slots)
    assert batch <= parts <= batch * steps
    waves = -(-parts * heads // slots)
    working = parts // batch * batch * heads / (waves * slots)
    assert working >= (0.9 if batch < 200 else 0.8)


@pytest.mark.parametrize("parts", [9, 11, 24, 48, 300])
def test_spread(parts):
    """Every step of every item in one part, and no part much longer than an even share."""
    rng = np.random.default_rng(parts)
    low = rng.integers(0, 20, 9).astype(np.int32)
    length = np.array([0, 1, 300, 2, 40, 40, 0, 7, 64], np.int32)
    low[6], high = 2**20, low + length
    high[6] = 0  # sees nothing: `bounds` gives it no order
    found = triton_parts.spread(jnp.asarray(low), jnp.asarray(high), parts)
    item, first, last, start = map(np.asarray, found)
    for i in range(9):
        own = np.arange(start[i], start[i + 1])
        assert np.all(item[own] == i)
        read = [s for p in own for s in range(first[p], last[p])]
        assert read == list(range(low[i], high[i]))
    np.testing.assert_array_equal(first[start[-1] :], last[start[-1] :])
    # The least length with which rounding up needs no more parts, from all lengths, is the optimum.
    best = next(n for n in range(1, 301) if sum(-(-x // n) for x in length) <= parts)
    assert max(last - first) <= 1.1 * best + 1
    if parts >= 24:
        assert start[3] - start[2] > start[9] - start[8] > start[8] - start[7]


def test_a_sequence_alone_and_in_a_batch():
    """With splits given, a sequence's result does not depend on the others: the same bits."""
    case = make("affine", page=64, group=2, paged=True, lengths=(600, 1, 130))
    one = dataclasses.replace(case.pages, table=case.pages.table[:1])
    alone = case.replace(q=case.q[:1], pages=one, starts=case.starts[:1], ends=case.ends[:1])
    both, own = run(case, splits=3), run(alone, splits=3)
    for name in ("acc", "top", "total"):
        np.testing.assert_array_equal(getattr(both, name)[0], getattr(own, name)[0])


def test_ragged_batch():
    """Parts of their own choice, one sequence empty: the sums of float64."""
    case = make("affine", page=64, group=2, paged=True, lengths=(600, 0, 130))
    cases.check(case, run(case, splits=None), tolerance="decode_triton")


def test_a_broken_sequence_breaks_no_other():
    """NaN in one sequence's parts stays there, though all parts lie side by side."""
    case = make("affine", page=64, group=2, paged=True, lengths=(300, 300))
    broken = case.replace(q=case.q.at[0].set(jnp.nan))
    got, whole = run(broken, splits=None), run(case, splits=None)
    assert np.all(np.isnan(got.acc[0]))
    np.testing.assert_array_equal(got.acc[1], whole.acc[1])


def test_the_target_is_what_is_compiled_for():
    """A device that the mesh names comes before the one that is here."""
    assert target().processors == H100_PROCESSORS
    for kind, cores, ptx in (("NVIDIA A100", 108, True), ("gfx942", 304, False)):
        device = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            assert (target().ptx, target().processors) == (ptx, cores)
