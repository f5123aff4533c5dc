"""Statistics of given vectors, made chunk by chunk with the functions that capture uses."""

import jax
import jax.numpy as jnp
import numpy as np

from turboq.numbers.rotation import Rotation
from turboq.plan import TextSource
from turboq_calibrate.observe import reduce
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.texts import Windows

_moments = jax.jit(reduce.moments)
_codes = jax.jit(reduce.codes, static_argnames="rotation")


def moments_of(x: np.ndarray) -> st.SideStatistics:
    """Sweep 1 of one chunk x [B, T, h, D]."""
    return st.SideStatistics(arrays=reduce.to_host(jax.device_get(_moments(jnp.asarray(x)))))


def with_codes(
    side: st.SideStatistics,
    x: np.ndarray,
    center: np.ndarray,
    scale: np.ndarray,
    rotation: Rotation,
) -> st.SideStatistics:
    """Sweep 2 of one chunk around a given center [h, D] and scale [h], added to its sweep 1."""
    reduced = _codes(jnp.asarray(x), jnp.asarray(center), jnp.asarray(scale), rotation=rotation)
    fields = reduce.to_host(jax.device_get(reduced)) | {"center": center, "scale": scale}
    return st.SideStatistics(arrays=side.arrays | fields, rotation=rotation)


def statistics_of(x: np.ndarray, rotation: Rotation, chunks: int = 1) -> st.SideStatistics:
    """Both sweeps over x [B, T, h, D], split into chunks along B, merged in order."""
    parts = np.array_split(x, chunks)
    first = [moments_of(p) for p in parts]
    total = first[0]
    for part in first[1:]:
        total = st.merge_sides(total, part)
    center, scale = total.mean.astype(np.float32), total.rms.astype(np.float32)
    both = [with_codes(m, p, center, scale, rotation) for m, p in zip(first, parts, strict=True)]
    total = both[0]
    for part in both[1:]:
        total = st.merge_sides(total, part)
    return total


def random_windows(vocab: int, count: int = 4, length: int = 16, seed: int = 1) -> Windows:
    """Windows of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (count, length), dtype=np.int32)
    return Windows(
        tokens=tokens,
        texts=(TextSource(name="random", sha256="1" * 64),),
        text=np.zeros(count, np.int32),
        available=count,
    )
