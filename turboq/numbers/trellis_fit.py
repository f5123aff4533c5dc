"""Fits the codebooks of `numbers.trellis` and writes them: `python -m turboq.numbers.trellis_fit`.

Generalised Lloyd iteration on Gaussian samples: Viterbi-encode, then move every point to the mean
of the samples it stands for. Neither step can raise the error. Samples are normals of the
documented Philox stream (`numbers.rotation`) with the stream number below: repeatable.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

from turboq.files import atomic_write
from turboq.numbers import codebook as codebooks
from turboq.numbers import trellis

STREAM = 16
LENGTH = 1024


def samples(count: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Standard normals [count, length], float32."""
    words = np.random.Philox(key=seed + (STREAM << 64)).random_raw(count * length)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return special.ndtri(uniform).astype(np.float32).reshape(count, length)


@functools.partial(jax.jit, static_argnums=0)
def sums(
    states: int, points: Float[Array, "P"], u: Float[Array, "N D"]
) -> tuple[Float[Array, "P"], Float[Array, "P"], Float[Array, ""]]:
    """Samples per point, their sums, and the mean squared error."""
    codes, start = trellis.encode(states, points, u)
    index = trellis.decode(states, jnp.arange(len(points), dtype=jnp.float32), codes, start)
    index = index.astype(jnp.int32).reshape(-1)
    flat = u.reshape(-1)
    zero = jnp.zeros(len(points), jnp.float32)
    error = jnp.mean((flat - points[index]) ** 2)
    return zero.at[index].add(1.0), zero.at[index].add(flat), error


def fit(states: int, bits: int, u: np.ndarray, rounds: int) -> tuple[np.ndarray, float]:
    """Codebook [2**(bits+1)], float64, and its mean squared error on the samples.

    Starts from the Lloyd-Max points of one more bit, drawn in by 5 %: TCQ points are
    reproductions of a rate-b code and lie a little closer to the origin.
    """
    trellis.check(states, bits)
    points = codebooks.lloyd_max("gaussian", bits + 1) * 0.95
    error = np.inf
    for _ in range(rounds):
        n, total, error = sums(states, jnp.asarray(points, jnp.float32), jnp.asarray(u))
        n, total = np.asarray(n, np.float64), np.asarray(total, np.float64)
        points = np.sort(np.where(n > 0, total / np.maximum(n, 1), points))
    return points, float(error)


def main() -> None:
    """Writes trellis_codebooks.json beside this file."""
    tables = {}
    for states in trellis.POLYNOMIALS:
        u = samples(1024)
        for bits in range(1, trellis.MAX_BITS + 1):
            points, error = fit(states, bits, u, rounds=40)
            tables[f"{states}-{bits}"] = [round(float(p), 5) for p in points]
            print(f"{states} states, {bits} bits: {-10 * np.log10(error):.3f} dB", flush=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in tables.items()]
    path = Path(__file__).with_name("trellis_codebooks.json")
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
