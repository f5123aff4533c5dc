"""The one pool with shared pages: what every sequence reads is what a cache of its own holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import GROUP, HEADS, ROPES, SCALE, make_layers
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.model_pool import ModelPool
from turboq.codecs import TurboQuantMSE
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE

DIM, WINDOW, CHUNK, ROOM = 24, 100, 20, 3 * PAGE
POLICY = TokenPolicy(sinks=3)

attend = jax.jit(model_cache.attend, static_argnames=("scale", "window"))


@dataclasses.dataclass
class Session:
    """A pool, and the keys and values that every living sequence was given."""

    rng: np.random.Generator
    pool: ModelPool
    given: dict[int, np.ndarray]  # [2, tokens, K, D]

    def extend(self, *names: int, chunk: int, counts: list[int]) -> None:
        new = self.rng.normal(size=(2, len(names), chunk, HEADS, DIM)).astype(np.float32)
        where = self.pool.step(names, counts)
        for i in range(len(self.pool.form.layers)):
            self.pool.write(i, where, *jnp.asarray(new))
        for n, (name, count) in enumerate(zip(names, counts, strict=True)):
            self.given[name] = np.concatenate([self.given[name], new[:, n, :count]], axis=1)

    def create(self) -> int:
        name = self.pool.pager.create()
        self.given[name] = np.zeros((2, 0, HEADS, DIM), np.float32)
        return name

    def fork(self, name: int) -> int:
        child = self.pool.pager.fork(name)
        self.given[child] = self.given[name]
        return child

    def truncate(self, name: int, length: int) -> None:
        self.pool.pager.truncate(name, length)
        self.given[name] = self.given[name][:, :length]

    def drop(self, name: int) -> None:
        self.pool.pager.drop(name)
        del self.given[name]

    def check(self) -> None:
        """Every sequence's newest query against a cache of its own, in every layer."""
        self.pool.pager.check()
        for name, tokens in self.given.items():
            length = tokens.shape[1]
            q = jnp.asarray(self.rng.normal(size=(1, 1, GROUP * HEADS, DIM)), jnp.float32)
            k, v = (jnp.asarray(np.pad(x, ((0, ROOM - length), (0, 0), (0, 0))))[None]
                    for x in tokens)  # fmt: skip
            where = self.pool.step([name], [0])
            for i, one in enumerate(self.pool.form.layers):
                options = {"q_positions": jnp.array([[length - 1]]), "scale": SCALE,
                           "window": one.layer.window}  # fmt: skip
                nothing = jnp.zeros((1, 1, HEADS, DIM), jnp.float32)
                held, words, tail = self.pool.write(i, where, nothing, nothing)
                got = attend(q, held, words, tail, **options)
                fresh = model_cache.Fresh(form=one, columns=words.shape[-1])
                state, words = fresh.init(1, ROOM)
                state, words, tail = _write(state, words, k, v, jnp.array([length], jnp.int32))
                want = attend(q, state, words, tail, **options)
                np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


_write = jax.jit(model_cache.write)


def layers_of(rng, policy):
    first, second = make_layers(rng, policy, ROPES["half"], joined=HEADS)
    return [first, dataclasses.replace(second, window=WINDOW)]


def session(rng, policy=POLICY, rows=3, pages=6) -> Session:
    pool = ModelPool(layers_of(rng, policy), pages=pages, rows=rows, per_sequence=3)
    return Session(rng, pool, {})


def test_sequences_share_part_are_taken_back_and_follow_each_other(rng):
    """Layers of the default form, one with a window. Pages are full of ones at the beginning."""
    s = session(rng)
    s.pool.words = [jnp.full_like(x, 2**32 - 1) for x in s.pool.words]
    a = s.create()
    s.extend(a, chunk=300, counts=[300])
    b = s.fork(a)
    assert s.pool.pager.pages_of(a) == s.pool.pager.pages_of(b)
    s.extend(a, b, chunk=1, counts=[1, 1])  # each its own last page now
    assert s.pool.pager.pages_of(a)[0] == s.pool.pager.pages_of(b)[0]
    assert s.pool.pager.pages_of(a)[1] != s.pool.pager.pages_of(b)[1]
    s.extend(a, b, chunk=CHUNK, counts=[2, CHUNK])
    assert s.pool.residency().shared == sum(words.nbytes // 6 for words in s.pool.words)
    s.truncate(b, 290)  # and written again
    s.extend(a, b, chunk=CHUNK, counts=[0, 15])
    s.check()
    s.drop(a)
    c = s.create()  # in the pages of a
    s.extend(c, chunk=300, counts=[260])
    s.check()
    assert s.pool.residency().active == sum(4 * words.nbytes // 6 for words in s.pool.words)
    for name in (b, c):
        s.drop(name)
    assert s.pool.pager.pool.free == 6
    assert all(not np.any(lost) for lost in s.pool.overflows())


def test_exact_tokens_are_each_sequences_own(rng):
    """A recent window and sinks of rows that are forked and taken by another sequence."""
    layer = layers_of(rng, TokenPolicy(sinks=3, recent=2))[0]
    s = Session(rng, ModelPool([layer], pages=6, rows=2, per_sequence=3), {})
    a = s.create()
    s.extend(a, chunk=CHUNK, counts=[10])
    b = s.fork(a)
    s.extend(a, b, chunk=CHUNK, counts=[4, CHUNK])
    s.drop(a)
    c = s.create()
    s.extend(b, c, chunk=CHUNK, counts=[1, 2])
    s.check()


def test_what_does_not_fit_is_refused_or_counted(rng):
    s = session(rng, pages=2)
    a = s.create()
    with pytest.raises(TurboqError, match="3 pages of 256 tokens are needed and 2 of 2 are free"):
        s.extend(a, chunk=600, counts=[600])
    s.extend(a, chunk=CHUNK, counts=[CHUNK])
    where = s.pool.step([a], [CHUNK])
    late = dataclasses.replace(where, room=jnp.array([25], jnp.int32))
    new = jnp.zeros((1, CHUNK, HEADS, DIM), jnp.float32)
    with pytest.raises(TurboqError, match=r"20 \+ 20 tokens do not fit the 25 slots"):
        s.pool.write(0, late, new, new)
    codec = TurboQuantMSE(dim=DIM, bits=3)
    other = uniform_layer(kv_heads=1, k=codec, v=codec, policy=POLICY)
    with pytest.raises(TurboqError, match=r"no learned plan that one pool holds.*turboq\.Pool"):
        ModelPool([other], pages=1, rows=1, per_sequence=1)
