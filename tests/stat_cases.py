"""Windows of given tokens, and statistics of given vectors by the functions that a run uses."""

import jax
import jax.numpy as jnp
import numpy as np

from turboq.plan import TextSource
from turboq_calibrate.observe import reduce
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.texts import Windows

_side = jax.jit(reduce.side, static_argnums=0)


def windows_of(tokens: np.ndarray, source: str = "random") -> Windows:
    """Windows of one made-up text."""
    text = np.zeros(len(tokens), np.int32)
    source_of = TextSource(name=source, sha256="1" * 64)
    return Windows(tokens=tokens, texts=(source_of,), text=text, available=len(tokens))


def random_windows(vocab: int, count: int = 4, length: int = 16, seed: int = 1) -> Windows:
    """Windows of random tokens."""
    rng = np.random.default_rng(seed)
    return windows_of(rng.integers(0, vocab, (count, length), dtype=np.int32))


def side_of(x: np.ndarray, g: np.ndarray | None = None) -> st.SideStatistics:
    """One chunk x [B, T, h, D]: of keys with gradients g, else of queries."""
    g = None if g is None else jnp.asarray(g)
    reduced = _side("q" if g is None else "k", jnp.asarray(x), g)
    return st.SideStatistics(arrays=reduce.to_host(jax.device_get(reduced)))
