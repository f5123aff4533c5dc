"""How much does a code that is linear in its stored bits gain, and which bits should it remember?

    python experiments/window_codes.py

Of the b bits of a coordinate `coded` lean on later coordinates too, through real taps (a state is
the last log2(states) of them), and the other b - coded choose a point of a line by rounding: b is
the window code of plain bits, 1 is `turboq.numbers.window`. A search step costs states * 2^coded
distances. Weights by alternating least squares from random starts on 512 Gaussian sequences of 64,
SNR in dB on 4096 others. Shannon: 6.02 b.

Prints the committed codes beside Lloyd-Max and trellises from a fixed state, on sequences of 64 and
of 1024 (what the start costs), then one line per code of the search; about 3 minutes on one core.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jaxtyping import Array, Float, Int

from turboq.codecs.distortion_curves import distortion_curve
from turboq.numbers import window
from turboq.numbers.trellis_fit import samples
from turboq.numbers.window_fit import uniform_step

LENGTH, STARTS, ROUNDS = 64, 9, 15
# bits, coded bits, states
CODES = [(1, 1, 64)] + [
    (bits, coded, states)
    for bits in (2, 3, 4)
    for coded in (1, 2, 3)
    for states in (16, 64, 256)
    if coded <= bits and states * 2**coded <= 1024
]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def search(
    coded: int, memory: int, points: int, step: Array, taps: Float[Array, "W"], x: Array
) -> tuple[Int[Array, "N C"], Float[Array, "N C"], Float[Array, "N C"]]:
    """Registers of the best paths (bit 0 is the newest), points of their lines, reproductions."""
    width, states, branches = coded + memory, 1 << memory, 1 << coded
    signs = jnp.asarray(_signs(width), jnp.float32)
    exists = jnp.asarray(_exists(coded, width), jnp.float32)
    centres = jnp.matmul(exists * taps[None, :], signs.T, precision="highest")  # [C, registers]
    middle = 0.5 * (points - 1)

    def on_line(left: Array) -> Array:
        return (jnp.clip(jnp.round(left / step + middle), 0, points - 1) - middle) * step

    def forward(cost: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        left = row[0][None, :] - row[1][:, None]
        off = left - on_line(left)
        error = jax.lax.optimization_barrier(jnp.square(off))  # once, not for each output
        ways = cost[:, None, :] + error.reshape(states, branches, -1)
        ways = ways.reshape(branches, states // branches, branches, -1)
        best = jnp.min(ways, axis=0).reshape(states, -1)
        return best - best[:1], jnp.argmin(ways, axis=0).astype(jnp.uint8).reshape(states, -1)

    def back(state: Array, way: Array) -> tuple[Array, Array]:
        oldest = jnp.take_along_axis(way, state[None, :], axis=0)[0].astype(jnp.int32)
        register = (oldest << memory) | state
        return register >> coded, register

    def paths(x: Array) -> Array:
        start = jnp.zeros((states, len(x)), jnp.float32)
        cost, kept = jax.lax.scan(forward, start, (x.T, centres))
        end = jnp.argmin(cost, axis=0).astype(jnp.int32)
        return jax.lax.scan(back, end, kept, reverse=True)[1].T

    registers = jax.lax.map(paths, x.reshape(-1, 64, LENGTH)).reshape(x.shape)
    lean = centres.T.at[registers, jnp.arange(LENGTH)[None, :]].get(mode="promise_in_bounds")
    line = on_line(x - lean)
    return registers, line, lean + line


def _signs(width: int) -> np.ndarray:
    return 2 * (np.arange(1 << width)[:, None] >> np.arange(width)[None, :] & 1) - 1


def _exists(coded: int, width: int) -> np.ndarray:
    return np.arange(width)[None, :] // coded <= np.arange(LENGTH)[:, None]


def snr(x: np.ndarray, y: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(x)) / np.mean(np.square(x - y))))


def fit(bits: int, coded: int, memory: int, x: np.ndarray, seed: int) -> tuple[float, list]:
    """Best SNR of one start, and its arguments of `search`."""
    rng, step = np.random.default_rng(seed), uniform_step(bits)
    older = rng.normal(size=memory) * (0.3, 0.6, 1.0)[seed % 3] * step / 2
    taps, line = np.append(step / 2 * 2.0 ** np.arange(coded), older), step * 2**coded
    points, best = 1 << (bits - coded), (-np.inf, [])
    signs, exists = _signs(coded + memory), _exists(coded, coded + memory)
    for _ in range(ROUNDS):
        code = [coded, memory, points, jnp.float32(line), jnp.asarray(taps, jnp.float32)]
        registers, on_line, y = map(np.asarray, search(*code, jnp.asarray(x)))
        best = max((best, (snr(x, y), code)), key=lambda found: found[0])
        a = (signs[registers] * exists[None]).reshape(-1, coded + memory)
        a = np.concatenate([a, on_line.reshape(-1, 1) / line], axis=1)
        found = np.linalg.lstsq(a.T @ a, a.T @ x.reshape(-1))[0]
        taps, line = found[:-1], float(found[-1]) if points > 1 else line
    return best


def committed() -> None:
    """SNR of every committed code."""

    def decibels(curve: np.ndarray) -> str:
        return " ".join(f"{x:6.2f}" for x in -10 * np.log10(curve[1:]))

    @jax.jit
    def error(code: window.Rows, u: Array) -> Array:
        return jnp.mean(jnp.square(u - window.decode(code, window.encode(code, u))))

    print(f"Lloyd-Max                  {decibels(distortion_curve('scalar'))}")
    for states in (8, 256):
        print(f"trellis, {states:3} states        {decibels(distortion_curve('trellis', states))}")
    for states in window.MEMORY:
        print(f"window, {states:3} states         {decibels(distortion_curve('window', states))}")
        u = jnp.asarray(samples(128, 1024, seed=1))
        codes = [window.rows(states, ((1024, b),)) for b in range(1, window.MAX_BITS + 1)]
        long = np.array([1.0] + [float(error(code, u)) for code in codes])
        print(f"    sequences of 1024      {decibels(long)}", flush=True)


def main(argv: list[str]) -> None:
    del argv
    committed()
    few, many = (samples(n, LENGTH, seed) for seed, n in enumerate((512, 4096)))
    for bits, coded, states in CODES:
        memory = states.bit_length() - 1
        best = max((fit(bits, coded, memory, few, s) for s in range(STARTS)), key=lambda f: f[0])
        got = snr(many, np.asarray(search(*best[1], jnp.asarray(many))[2]))
        print(
            f"{bits} bits, {coded} coded, {states} states: {got:.2f} dB, "
            f"{states << coded} distances a coordinate",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
