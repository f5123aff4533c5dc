"""Fits the weights of `numbers.window` and writes them: `python -m turboq.numbers.window_fit`.

Alternating least squares on Gaussian samples: Viterbi-encode, then regress the samples on the bits
found. Neither step can raise the error. Starts are random older taps, the code of one bit less and
that of fewer states; all are tried on few samples, the best few on many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.files import atomic_write
from turboq.numbers import codebook as codebooks
from turboq.numbers import window
from turboq.numbers.trellis_fit import samples

LENGTH = 64
STARTS = 12  # random ones, up to RANDOM bits
RANDOM = 5
FEW, MANY, FINALISTS = 128, 512, 2
LEANING = (0.3, 0.6, 1.0)  # spread of the first older taps, in half steps of a uniform quantizer


def code_of(weights: Array, last: Array, length: int) -> window.Rows:
    """A code with the same weights [step, taps...] everywhere; `last`: points of its line but 1."""
    wide = jnp.broadcast_to(weights[None, :], (length, len(weights)))
    reach = np.arange(len(weights) - 1)[None, :] <= np.arange(length)[:, None]
    last = jnp.broadcast_to(last[None], (length,))
    return window.Rows(step=wide[:, 0], last=last, taps=wide[:, 1:] * reach.astype(np.float32))


@jax.jit
def normal_equations(
    weights: Float[Array, "W"], last: Float[Array, ""], u: Float[Array, "N C"]
) -> tuple[Float[Array, "W W"], Float[Array, "W"], Float[Array, ""]]:
    """A^T A, A^T u and the mean squared error, A being the regressors at the bits of best paths."""
    code = code_of(weights, last, u.shape[1])
    codes = window.encode(code, u)
    error = jnp.mean(jnp.square(u - window.decode(code, codes)))
    own = 2.0 * (codes & jnp.uint8(1)).astype(jnp.float32) - 1.0
    place = (codes >> jnp.uint8(1)).astype(jnp.float32) - 0.5 * last
    older = [jnp.pad(own, ((0, 0), (j, 0)))[:, : u.shape[1]] for j in range(len(weights) - 1)]
    a = jnp.stack([place, *older], axis=-1).reshape(-1, len(weights))
    exact = jax.lax.Precision.HIGHEST
    both = jnp.matmul(a.T, a, precision=exact), jnp.matmul(a.T, u.reshape(-1), precision=exact)
    return *both, error


def uniform_step(bits: int) -> float:
    """Step of the best uniform quantizer of a unit Gaussian, to about 1 % (golden section)."""

    def error(step: float) -> float:
        points = step * (np.arange(2**bits) - (2**bits - 1) / 2)
        return codebooks.distortion("gaussian", points)

    low, high = 2.0**-bits, 10 * 2.0**-bits
    for _ in range(20):
        a, b = low + 0.382 * (high - low), low + 0.618 * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2


def equations(weights: np.ndarray, bits: int, u: Float[Array, "N C"]) -> list[np.ndarray]:
    """`normal_equations` of a code of so many bits, float64."""
    last = jnp.asarray(2.0 ** (bits - 1) - 1, jnp.float32)
    found = normal_equations(jnp.asarray(weights, jnp.float32), last, u)
    return [np.asarray(a, np.float64) for a in found]


def descend(
    weights: np.ndarray, bits: int, u: Float[Array, "N C"], rounds: int
) -> tuple[float, np.ndarray]:
    """Least mean squared error of so many rounds, and the weights that had it."""
    best = np.inf, weights
    for _ in range(rounds):
        aa, au, error = equations(weights, bits, u)
        best = min(best, (float(error), weights), key=lambda found: found[0])
        weights = np.linalg.lstsq(aa, au)[0]
    return best


def fit(
    states: int, bits: int, u: Float[Array, "N C"], starts: int, near: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Weights [step, taps...], float64; `near`: those of neighbours, of this memory or a shorter.

    One bit, which has no line, gains nothing from older bits (0.01 dB at 64 states): it has none.
    """
    window.check(states, bits)
    step, memory = uniform_step(bits), window.MEMORY[states]
    plain = np.concatenate([[2 * step, step / 2], np.zeros(memory)])
    if bits == 1:
        return plain
    first = [plain]
    for other in near:
        scaled = other * (2 * step / other[0])
        first.append(np.pad(scaled, (0, memory + 2 - len(scaled))))
    for seed in range(starts):
        spread = LEANING[seed % len(LEANING)] * step / 2
        older = np.random.default_rng(seed).normal(size=memory) * spread
        first.append(np.concatenate([[2 * step, step / 2], older]))
    tried = sorted((descend(w, bits, u[:FEW], 15) for w in first), key=lambda found: found[0])
    finals = [descend(w, bits, u, 30) for _, w in tried[:FINALISTS]]
    return min(finals, key=lambda found: found[0])[1]


def main() -> None:
    """Writes window_weights.json beside this file."""
    u, test = (jnp.asarray(samples(n, LENGTH, seed)) for seed, n in enumerate((MANY, 4096)))
    tables: dict[tuple[int, int], np.ndarray] = {}
    fewer = dict(zip(list(window.MEMORY)[1:], window.MEMORY, strict=False))
    for states in window.MEMORY:
        for bits in range(1, window.MAX_BITS + 1):
            near = [(states, bits - 1), (fewer.get(states, 0), bits)]
            near = [tables[code] for code in near if code in tables]
            weights = fit(states, bits, u, STARTS if bits <= RANDOM else 0, near)
            tables[states, bits] = weights.round(5)
            error = equations(tables[states, bits], bits, test)[2]
            print(f"{states} states, {bits} bits: {-10 * np.log10(error):.3f} dB", flush=True)
            write(tables)


def write(tables: dict[tuple[int, int], np.ndarray]) -> None:
    lines = [f'  "{s}-{b}": {json.dumps(values.tolist())}' for (s, b), values in tables.items()]
    path = Path(__file__).with_name("window_weights.json")
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
