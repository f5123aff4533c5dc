"""Codecs of token blocks around every edge: whole blocks behind the recent window, nothing else.

What a cache stores of n tokens is, for the first floor((n - recent) / block) blocks, what the codec
makes of those blocks by themselves, and zeros behind them.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.cache.simulate import round_exact
from turboq.codecs import KiviKey, KiviValue, KVarN
from turboq.numbers import packing
from turboq.numbers.packing import PAGE
from turboq.plan import uniform_plan
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

DIM, CHUNK, BATCH = 8, 33, 21
CODECS = {
    "kivi": (KiviKey(dim=DIM, bits=2), KiviValue(dim=DIM, bits=2, group=8)),
    "kvarn": (
        KVarN(dim=DIM, bits=2, iterations=1),
        KVarN(dim=DIM, bits=2, iterations=1, axis="token"),
    ),
}
RECENT = (0, 16, 32, 128)


def edges(recent: int, block: int) -> np.ndarray:
    """BATCH prompt lengths around the ends of the window, of blocks behind it, of the buffer."""
    at = {1, recent, recent + block, recent + 2 * block, PAGE - block, PAGE - CHUNK, PAGE}
    found = sorted({n + d for n in at for d in (-1, 0, 1) if 1 <= n + d <= PAGE})
    return np.array(found + [1] * (BATCH - len(found)), np.int32)


def layer_of(name: str, recent: int):
    k, v = CODECS[name]
    return uniform_layer(kv_heads=1, k=k, v=v, policy=TokenPolicy(sinks=1, recent=recent))


@functools.cache
def data():
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.standard_normal((BATCH, PAGE, 1, DIM)), jnp.float32) for _ in "kv"]


@functools.cache
def whole(name: str):
    """Fields of whole blocks of all tokens, K and V, [B, S, width], encoded by themselves."""
    policy = TokenPolicy()
    return [
        jax.jit(functools.partial(codec.encode, {}))(round_exact(policy, x[:, :, 0]))
        for codec, x in zip(CODECS[name], data(), strict=True)
    ]


def check(name: str, recent: int, lengths: np.ndarray, groups) -> None:
    """`groups` are buffers [B, 1, ...] of contiguous caches with these lengths."""
    layer = layer_of(name, recent)
    for codec, stored, want in zip(
        CODECS[name], (groups[0].k, groups[0].v), whole(name), strict=True
    ):
        for field in codec.fields:
            got = np.asarray(stored[field.name])[:, 0]
            if field.packed:
                got = packing.unpack_host(np.asarray(packing.kept(jnp.asarray(got), field.width)))
            for b, n in enumerate(lengths):
                # Whole blocks of the layer; a codec whose own blocks are smaller follows them.
                end = max(n - recent, 0) // layer.block * layer.block
                rows = end // codec.block if field.per_block else end
                np.testing.assert_array_equal(
                    got[b, :rows], np.asarray(want[field.name])[b, :rows], err_msg=f"{field} {n}"
                )
                assert not got[b, rows:].any(), (field, n)


def plan_of(lengths: np.ndarray) -> list[np.ndarray]:
    """Counts of three more chunks: one token, a full chunk, and up to the end of the buffer."""
    out, at = [], lengths.copy()
    for count in (1, CHUNK, CHUNK - 1):
        out.append(np.minimum(PAGE - at, count).astype(np.int32))
        at = at + out[-1]
    return out


def chunk_at(x, start: np.ndarray, size: int):
    """Tokens start[b] onwards of every sequence, [B, size, 1, D]; behind the end anything."""
    at = np.minimum(start[:, None] + np.arange(size), PAGE - 1)
    return jnp.take_along_axis(x, jnp.asarray(at, jnp.int32)[:, :, None, None], axis=1)


@pytest.mark.parametrize("recent", RECENT)
@pytest.mark.parametrize("name", CODECS)
def test_write(name, recent):
    layer = layer_of(name, recent)
    lengths = edges(recent, layer.block)
    k, v = data()
    cache = kv_cache.init(layer, batch=BATCH, capacity=PAGE)
    cache, _ = kv_cache.write(layer, cache, k, v, jnp.asarray(lengths))
    check(name, recent, lengths, cache.groups)
    for counts in plan_of(lengths):
        part = (chunk_at(x, lengths, CHUNK) for x in (k, v))
        cache, _ = kv_cache.write(layer, cache, *part, jnp.asarray(counts))
        lengths = lengths + counts
        check(name, recent, lengths, cache.groups)
    assert cache.lengths.tolist() == lengths.tolist()


@pytest.mark.parametrize(("name", "recent", "page"), [("kivi", 16, 64), ("kvarn", 128, 256)])
def test_pool(name, recent, page):
    layer = layer_of(name, recent)
    lengths = edges(recent, layer.block)
    width = PAGE // page
    pool = Pool([layer], pages=BATCH * width, rows=BATCH, per_sequence=width, page=page)
    names = [pool.pager.create() for _ in lengths]
    (k, v), at = data(), 0 * lengths
    for counts in (lengths, *plan_of(lengths)):
        where = pool.step(names, counts.tolist())
        size = PAGE if at.max() == 0 else CHUNK
        pool.write(0, where, *(chunk_at(x, at, size) for x in (k, v)))
        at = at + counts
    table = np.asarray(where.table)
    owned = np.arange(width) < np.asarray(where.room)[:, None] // page

    def gathered(x):  # [pages, N, ...] -> [B, N, pages of a sequence x ..., ...]
        x = np.asarray(x)[table]
        x = np.where(owned.reshape(*owned.shape, *(1,) * (x.ndim - 2)), x, 0).swapaxes(1, 2)
        return x if x.ndim > 5 else x.reshape(*x.shape[:2], -1, x.shape[-1])

    group = pool.caches[0].groups[0]
    at_end = type(group)(
        **dict.fromkeys(("k_sinks", "v_sinks", "k_recent", "v_recent")),
        k={n: gathered(x) for n, x in group.k.items()},
        v={n: gathered(x) for n, x in group.v.items()},
    )
    check(name, recent, at, [at_end])


@pytest.fixture(scope="module")
def model():
    return load_model(Path(__file__).parents[2] / "golden" / "llama")


def plan(model):
    k, v = KiviKey(dim=8, bits=2), KiviValue(dim=8, bits=2, group=8)
    return uniform_plan(model_geometry(model), k=k, v=v, policy=TokenPolicy(recent=128))


def test_greedy(model):
    """To the last slot: what a prompt generates, that prompt and its first tokens generate."""
    layers = plan(model).kv_layers({})
    prompt = np.random.default_rng(1).integers(0, model.spec.vocab, (1, 249)).astype(np.int32)
    got = greedy(model, prompt, 7, layers=layers).tokens
    longer = np.concatenate([prompt, got[:, :3]], axis=1)
    np.testing.assert_array_equal(greedy(model, longer, 4, layers=layers).tokens, got[:, 3:])


def test_evaluate(model):
    """A window that fills the buffer; packed and simulated attention agree."""
    windows = np.random.default_rng(1).integers(0, model.spec.vocab, (1, 256)).astype(np.int32)
    named = [("kivi", plan(model), {})]
    packed, simulated = (
        evaluate(model, named, windows, text="noise", attention=a, progress=False).table["rows"][0]
        for a in ("packed", "simulated")
    )
    assert packed["quantized_tokens"] == simulated["quantized_tokens"] > 0
    np.testing.assert_allclose(packed["kl_mean"], simulated["kl_mean"], rtol=0.05)
