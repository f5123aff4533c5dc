"""Random sessions over pools of shared pages: does anything leak, is anything overwritten?

    python experiments/soak.py --minutes=10

Sequences are created, extended by one token or a chunk, forked, truncated and dropped at random;
when the pool is full the ones used longest ago are evicted. After every --every operations one
living sequence is compared with a fresh cache that is given the same tokens at once: its attention
output must be equal bit by bit. At the end all are dropped, and every page and row must be free.
Pools by turns: of codecs of their own (`turboq.Pool`), and of a learned plan (`turboq.ModelPool`).

Expected: `0 leaked pages, 0 differences`, exit code 0.
"""

from __future__ import annotations

import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import turboq_kernels
from turboq.cache import model_cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.cache.model_pool import ModelPool
from turboq.cache.pager import drop_least_recent
from turboq.cache.pool import Pool
from turboq.codecs import IntAffine, PerHead, Transform
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE

DIM, GROUP = 16, 2
OPERATIONS = {"extend": 0.55, "create": 0.15, "fork": 0.15, "drop": 0.1, "truncate": 0.05}


def layer_of(policy: TokenPolicy) -> KVLayer:
    """Two groups with different codecs, bits and arrays.

    None of them sums in its encoder: a float16 scale from a sum may differ in its last bit when XLA
    compiles the same sum for another number of tokens (1 in about 10^5 seen), which is no matter
    of pages.
    """
    rng = np.random.default_rng(7)
    fitted = {
        "mean": jnp.asarray(rng.standard_normal((1, DIM)), jnp.float32),
        "codebook": jnp.asarray(np.sort(rng.standard_normal((1, 8))), jnp.float32),
        "scale": jnp.ones((1,), jnp.float32),
    }
    static = PerHead(dim=DIM, bits=3, scale="head", rotation="identity")
    two, three, four = (IntAffine(dim=DIM, bits=b, rotation="identity") for b in (2, 3, 4))
    groups = (
        HeadGroup(heads=(1,), k=static, v=two, k_arrays=fitted, v_arrays={}),
        HeadGroup(heads=(0,), k=four, v=three, k_arrays={}, v_arrays={}),
    )
    return KVLayer(groups=groups, policy=policy)


def learned_layer_of(policy: TokenPolicy) -> KVLayer:
    """Window codes of other bits in each head, for `ModelPool`; their bases are the identity."""

    def group(head: int, *segments: tuple[int, int]) -> HeadGroup:
        codec = Transform(dim=DIM, segments=segments, quantizer="window", states=16)
        x = np.random.default_rng(head).standard_normal((1, 200, DIM)).astype(np.float32)
        arrays = {name: jnp.asarray(a) for name, a in codec.fit(Observed.of(x)).items()}
        width = arrays["analysis"].shape[1]
        turn = jnp.eye(width, DIM)[None]
        arrays |= {"analysis": turn, "synthesis": jnp.swapaxes(turn, 1, 2)}
        arrays["mean"] = jnp.zeros((1, DIM))
        return HeadGroup(heads=(head,), k=codec, v=codec, k_arrays=arrays, v_arrays=arrays)

    return KVLayer(groups=(group(1, (8, 3), (8, 1)), group(0, (16, 2))), policy=policy)


@dataclasses.dataclass
class Soak:
    """A pool under random load, and what every living sequence was given."""

    rng: np.random.Generator
    page: int = 64
    pages: int = 24
    per_sequence: int = 6
    rows: int = 7
    chunks: tuple[int, ...] = (1, 9, 100)  # few sizes, so that little is compiled
    together: int = 2  # sequences of one step, at most
    layer: KVLayer = dataclasses.field(default_factory=lambda: layer_of(TokenPolicy(sinks=3)))
    learned: bool = False  # the layer is one of a learned plan

    def __post_init__(self):
        self.pool = self._pool(self._evict)
        self.tokens: dict[int, np.ndarray] = {}  # k and v of each sequence: [2, t, K, D]
        self.done: collections.Counter[str] = collections.Counter()

    def _pool(self, evict) -> Pool | ModelPool:
        size = {"pages": self.pages, "rows": self.rows, "per_sequence": self.per_sequence}
        if self.learned:
            return ModelPool([self.layer], **size, evict=evict)
        return Pool([self.layer], **size, page=self.page, evict=evict)

    def _evict(self, pager, enough, keep):
        drop_least_recent(pager, enough, keep)
        for name in set(self.tokens) - set(pager.sequences):
            del self.tokens[name]
            self.done["evicted"] += 1

    def operate(self) -> None:
        """One random operation."""
        kind = str(self.rng.choice(list(OPERATIONS), p=list(OPERATIONS.values())))
        names = list(self.tokens)
        if not names or kind == "create":
            kind, names = "create", [self.pool.pager.create()]
            self.tokens[names[0]] = np.zeros((2, 0, 2, DIM), np.float32)
        name = int(self.rng.choice(names))
        length = self.tokens[name].shape[1]
        if kind == "extend":
            self._extend(self._some(names))
        elif kind == "fork":
            cut = length if self.layer.policy.recent else int(self.rng.integers(0, length + 1))
            child = self.pool.pager.fork(name, cut)
            self.tokens[child] = self.tokens[name][:, :cut]
        elif kind == "truncate" and not self.layer.policy.recent:
            cut = int(self.rng.integers(max(length - 20, 0), length + 1))
            self.pool.pager.truncate(name, cut)
            self.tokens[name] = self.tokens[name][:, :cut]
        elif kind == "drop":
            self.pool.pager.drop(name)
            del self.tokens[name]
        self.done[kind] += 1
        self.pool.pager.check()

    def _some(self, names: list[int]) -> list[int]:
        count = min(int(self.rng.integers(1, self.together + 1)), len(names))
        return [int(n) for n in self.rng.choice(names, count, replace=False)]

    def _extend(self, names: list[int]) -> None:
        chunk = int(self.rng.choice(self.chunks))
        room = self.per_sequence * self.page
        counts = [
            min(int(self.rng.integers(1, chunk + 1)), room - self.tokens[n].shape[1]) for n in names
        ]
        try:
            where = self.pool.step(names, counts)
        except TurboqError:  # what is extended may need more than all others leave
            self.done["refused"] += 1
            return
        new = self.rng.standard_normal((2, len(names), chunk, 2, DIM)).astype(np.float32)
        self.pool.write(0, where, jnp.asarray(new[0]), jnp.asarray(new[1]))
        for i, (name, count) in enumerate(zip(names, counts, strict=True)):
            self.tokens[name] = np.concatenate([self.tokens[name], new[:, i, :count]], axis=1)

    def differs(self) -> bool:
        """Whether some sequence's attention is not that of a fresh cache with the same tokens."""
        names = [n for n, t in self.tokens.items() if t.shape[1]]
        if not names:
            return False
        name = int(self.rng.choice(names))
        k, v = self.tokens[name]
        room = self.per_sequence * self.page
        fresh = self._pool(None)
        where = fresh.step([fresh.pager.create()], [len(k)])
        padded = np.zeros((2, 1, room, 2, DIM), np.float32)
        padded[0, 0, : len(k)], padded[1, 0, : len(k)] = k, v
        fresh.write(0, where, jnp.asarray(padded[0]), jnp.asarray(padded[1]))
        q = jnp.asarray(self.rng.standard_normal((1, 1, 2 * GROUP, DIM)), jnp.float32)
        outs = [_attend(p, n, q) for p, n in ((self.pool, name), (fresh, fresh.pager.sequences[0]))]
        self.done["compared"] += 1
        return not np.array_equal(outs[0], outs[1])

    def leaked(self) -> int:
        """Drops everything; pages and rows that are still not free."""
        for name in list(self.tokens):
            self.pool.pager.drop(name)
        pager = self.pool.pager
        return self.pages - pager.pool.free + self.rows - pager.row_pool.free


def _attend(pool: Pool | ModelPool, name: int, q) -> np.ndarray:
    """The newest token's query over all that a sequence holds; nothing is written."""
    where = pool.step([name], [0])
    nothing = jnp.zeros((1, 1, 2, DIM), jnp.float32)
    positions = jnp.asarray([[pool.pager.length(name) - 1]], jnp.int32)
    # No token is real: only the ring is read.
    if isinstance(pool, ModelPool):
        state, words, tail = pool.write(0, where, nothing, nothing)
        return np.asarray(_of_one_pool(q, state, words, tail, q_positions=positions, scale=0.3))
    tail = pool.write(0, where, nothing, nothing)
    out = turboq_kernels.cache_attention(
        q, pool.layers[0], pool.view(0, where), tail, q_positions=positions, scale=0.3
    )
    return np.asarray(out)


_of_one_pool = jax.jit(model_cache.attend, static_argnames="scale")


def main(argv: list[str]) -> None:
    del argv
    rng = np.random.default_rng(flags.FLAGS.seed)
    end = time.monotonic() + 60 * flags.FLAGS.minutes
    total, leaked, different, cycles = collections.Counter(), 0, 0, 0
    while time.monotonic() < end:  # pools and page sizes by turns, then with a recent window
        policy = TokenPolicy(sinks=3, recent=cycles // 3 % 2 * 5)
        soak = Soak(
            rng,
            page=(64, PAGE, PAGE)[cycles % 3],
            layer=(layer_of, layer_of, learned_layer_of)[cycles % 3](policy),
            learned=cycles % 3 == 2,
        )
        for i in range(2000):
            soak.operate()
            if i % flags.FLAGS.every == 0:
                different += soak.differs()
            if time.monotonic() > end:
                break
        report, residency = soak.pool.pager.report(), soak.pool.residency()
        leaked += soak.leaked()
        total += soak.done
        cycles += 1
    print(f"{dict(total)}\nlast pool: {report}\n{residency}")
    print(f"{leaked} leaked pages, {different} differences")
    if leaked or different:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 10.0, "How long.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of all random choices.")
    flags.DEFINE_integer("every", 20, "Operations between comparisons.", lower_bound=1)
    app.run(main)
