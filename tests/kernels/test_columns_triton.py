"""Column kernels on GPUs: how a batch is spread over the card, and how exact their sums are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import GROUP, HEADS, SCALE, holding, inputs, make_layers
from jax.sharding import AbstractDevice, AbstractMesh
from tolerances import TOL

from turboq.cache.columns import BIT_OF
from turboq.cache.layer import TokenPolicy
from turboq_kernels.columns import linear, queries, triton

LENGTHS = (530, 0, 40)


@pytest.fixture(scope="module")
def case():
    """Three sequences of three pages at most: every head has other bits, no stored gains."""
    rng = np.random.default_rng(5)
    held, words = holding(rng, make_layers(rng, TokenPolicy(), gain="none"), LENGTHS, 3)
    made = linear.linear_layer(held[0][0].form, pool_lanes=words.shape[-1])
    k, v = triton.local(made, words.shape[-1])
    rows = queries.to_rows(inputs(rng, 1, batch=3)[0], HEADS)
    folded = queries.fold(rows, made, slots=768, rope=None, block=1, matrix=k)
    ends = jnp.broadcast_to(jnp.asarray(LENGTHS, jnp.int32)[:, None], rows.shape[:2])
    return rows, folded, words, made, v, ends


def run(case, only=slice(None), splits=None, left=None):
    _, folded, words, made, _, ends = case
    folded = folded if left is None else dataclasses.replace(folded, left=left)
    folded = jax.tree.map(lambda x: x[only], folded)
    return triton.attend(
        folded, words[only], made, jnp.zeros_like(ends[only]), ends[only],
        scale=SCALE, softcap=None, interpret=True, splits=splits,
    )  # fmt: skip


def due(case):
    """Normalised outputs in float64, from the words themselves and the matrix of all lanes."""
    rows, _, words, made, *_ = case
    token = np.arange(words.shape[1] * 256)
    bits = np.asarray(words)[:, token // 256, token % 8]
    bits = bits >> BIT_OF[token // 8 % 32][None, :, None].astype(np.uint32) & 1
    out = np.zeros(rows.shape)
    for n in range(rows.shape[1]):
        head, levels = n // GROUP, []
        for i, side in enumerate((made.k, made.v)):
            matrix = np.asarray(side.matrix, np.float64)[0] * (np.asarray(side.unit) == head)
            at = int(made.first[i])
            own = np.pad(bits, ((0, 0), (0, 0), (0, matrix.shape[1])))[..., at:]
            levels.append(
                (own[..., : matrix.shape[1]] - 0.5) @ matrix.T + np.asarray(side.mean)[head]
            )
        for b, length in enumerate(LENGTHS):
            if length:
                logits = levels[0][b, :length] @ np.asarray(rows[b, n], np.float64) * SCALE
                p = np.exp(logits - logits.max())
                out[b, n] = p @ levels[1][b, :length] / p.sum()
    return out


@pytest.mark.parametrize("cores", [None, 5])
def test_a_ragged_batch(case, cores):
    """An empty sequence, a short one and a long one: as many parts as an H100 or 5 SMs hold."""
    device = AbstractDevice(device_kind="NVIDIA", num_cores=cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        sums = run(case)
    got = queries.values(sums, case[3], case[4]) / np.maximum(np.asarray(sums.total), 1)[..., None]
    np.testing.assert_allclose(got, due(case), atol=TOL["columns_triton"])
    assert not np.any(np.asarray(sums.total)[1])


def prmt(a, b, selector):
    """`prmt.b32` of NVIDIA's manual: byte i is the one that nibble i of the selector names."""
    source = a | b << 32
    return sum((source >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def v_perm(high, low, selector):
    """`v_perm_b32` of AMD's manuals: byte i is the one that byte i names, 12 is zero."""
    source, names = high << 32 | low, [selector >> 8 * i & 255 for i in range(4)]
    return sum((source >> 8 * k & 255) << 8 * i for i, k in enumerate(names) if k != 12)


@pytest.mark.parametrize("asm", ["ptx", "gcn", None])
def test_the_assembly_takes_the_bytes_it_is_told(asm, monkeypatch):
    """One byte of each of four words, by NVIDIA's and AMD's instructions, executed here."""
    does = {"prmt.b32": prmt, "v_perm_b32": v_perm}

    def run(code, *args):
        name, *operands = code.rstrip(";").replace(",", "").split()
        args = np.broadcast_arrays(*(np.asarray(x, np.uint32) for x in args))
        out = np.empty(args[0].shape, np.uint32)
        for at in np.ndindex(out.shape):
            held = {f"${i + 1}": int(x[at]) for i, x in enumerate(args)}
            out[at] = does[name](*(held[x] if x in held else int(x, 0) for x in operands[1:]))
        return jnp.asarray(out)

    monkeypatch.setattr(triton, "assembly", run)
    four = np.random.default_rng(0).integers(0, 2**32, (4, 1, 50), dtype=np.uint32)
    select = [jnp.asarray(x, jnp.uint32)[:, None] for x in triton._selectors(asm)]
    w0, w1, w2, w3 = map(jnp.asarray, four)
    got = np.asarray(triton._bytes([w0, w2, w1, w3], select, asm))
    bytes_of = four[:, 0].view(np.uint8).reshape(4, 50, 4)
    for byte in range(4):
        np.testing.assert_array_equal(
            got[byte].view(np.uint8).reshape(50, 4), bytes_of[..., byte].T
        )


def test_a_pair_is_as_exact_as_it_says():
    x = np.random.default_rng(1).uniform(-127, 127, 5000).astype(np.float32)
    for of in (triton.pair, jax.jit(triton.pair)):
        high, low = (np.asarray(y, np.float64) for y in of(jnp.asarray(x)))
        assert np.max(np.abs(high + low / triton.LOW - x)) <= 0.5 / triton.LOW * (1 + 1e-4)


def test_a_sequence_alone_and_in_a_batch(case):
    """With splits given, a sequence's sums do not depend on the others: the same bits."""
    both, own = run(case, splits=2), run(case, only=slice(1), splits=2)
    for name in ("acc", "top", "total"):
        np.testing.assert_array_equal(getattr(both, name)[0], getattr(own, name)[0])


def test_a_broken_sequence_breaks_no_other(case):
    got = run(case, left=case[1].left.at[0].set(jnp.nan))
    assert np.all(np.isnan(got.acc[0]))
    np.testing.assert_array_equal(got.acc[2], run(case).acc[2])
