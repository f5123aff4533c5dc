"""What would codes of 1 and 1.5 bits gain that are no window codes, and would a plan notice?

    python experiments/low_rate_codes.py [--statistics=FOLDER]

A trellis takes `bits` new bits per step, remembers as many as its states have, and puts out `width`
coordinates from a table of all registers: Lloyd's iteration from random tables on 384 Gaussian
sequences of 64, SNR in dB on 2,048 others, start in state 0. At 1 bit its table is then cut to its
K largest Walsh terms (parities of register bits: XORs of stored planes, K columns for a reader) and
their weights are fitted again. Shannon: 6.02 dB a bit.

Then the squared error that the best segments leave on geometric spectra at each size, with such
codes beside window codes of 64 states, over that of window codes alone. With --statistics also what
`turboq plan --budget` predicts in nats if a window code of 1 bit reached 5.14 dB. About a minute
on one core, as long again for a plan.
"""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float, Int

from turboq.codecs.distortion_curves import distortion_curve
from turboq.codecs.water_filling import batched_rates
from turboq.numbers.trellis_fit import samples
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, solve
from turboq_calibrate.observe.statistics_files import load_statistics

STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`, for plans.")
LENGTH, STARTS, ROUNDS = 64, 3, 25
CODES = [(1, 1, 16), (1, 1, 64), (1, 1, 256), (3, 2, 8), (3, 2, 64), (1, 2, 16)]
TERMS = (2, 3, 4, 8)
ONE_BIT, BIT_AND_A_HALF = 5.14, 7.85  # dB, about the best of the first part
BUDGETS = (1.25, 1.75, 2.25)


@functools.partial(jax.jit, static_argnums=(0, 1))
def search(
    bits: int, states: int, table: Float[Array, "R w"], u: Float[Array, "N S w"]
) -> Int[Array, "N S"]:
    """Registers (state, then the new bits) of the paths of least squared error from state 0."""
    memory, branches = states.bit_length() - 1, 1 << bits

    def forward(cost: Array, x: Array) -> tuple[Array, Array]:
        off = jnp.sum(jnp.square(x[None] - table[:, None]), axis=-1)
        ways = jnp.repeat(cost, branches, axis=0) + jax.lax.optimization_barrier(off)
        ways = ways.reshape(branches, states, -1)
        return jnp.min(ways, axis=0), jnp.argmin(ways, axis=0).astype(jnp.uint8)

    def back(state: Array, way: Array) -> tuple[Array, Array]:
        oldest = jnp.take_along_axis(way, state[None], axis=0)[0].astype(jnp.int32)
        register = oldest << memory | state
        return register >> bits, register

    def path(x: Array) -> Array:
        start = jnp.where(jnp.arange(states) == 0, 0.0, 1e9)[:, None] + jnp.zeros((1, len(x)))
        cost, kept = jax.lax.scan(forward, start, x.swapaxes(0, 1))
        end = jnp.argmin(cost, axis=0).astype(jnp.int32)
        return jax.lax.scan(back, end, kept, reverse=True)[1].T

    parts = u.reshape(-1, 64, *u.shape[1:])
    return jax.lax.map(path, parts).reshape(len(u), -1)


def coded(bits: int, states: int, table: np.ndarray, u: np.ndarray) -> tuple[float, np.ndarray]:
    """SNR in dB, and the registers."""
    steps = jnp.asarray(u.reshape(len(u), -1, table.shape[1]))
    found = np.asarray(search(bits, states, jnp.asarray(table, jnp.float32), steps))
    left = u - table[found].reshape(u.shape)
    return float(10 * np.log10(np.mean(u * u) / np.mean(left * left))), found


def lloyd(bits: int, width: int, states: int, u: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Best SNR of one start, and its table."""
    table = np.random.default_rng(seed).normal(size=(states << bits, width))
    best = -np.inf, table
    for _ in range(ROUNDS):
        db, found = coded(bits, states, table, u)
        best = max(best, (db, table), key=lambda pair: pair[0])
        count = np.bincount(found.ravel(), minlength=len(table))[:, None]
        flat = u.reshape(-1, width)
        sums = [np.bincount(found.ravel(), x, minlength=len(table)) for x in flat.T]
        table = np.where(count > 0, np.stack(sums, axis=1) / np.maximum(count, 1), table)
    return best


def cut(states: int, table: np.ndarray, terms: int, u: np.ndarray) -> np.ndarray:
    """The table of its largest Walsh terms, their weights by alternating least squares."""
    registers = np.arange(len(table))
    walsh = 1.0 - 2 * (np.bitwise_count(registers[:, None] & registers[None, :]) & 1)
    own = np.argsort(-np.abs(walsh @ table[:, 0]))[:terms]
    weights, best = walsh[own] @ table[:, 0] / len(table), (-np.inf, table)
    for _ in range(ROUNDS):
        now = (weights @ walsh[own])[:, None]
        db, found = coded(1, states, now, u)
        best = max(best, (db, now), key=lambda pair: pair[0])
        weights = np.linalg.lstsq(walsh[own][:, found.ravel()].T, u.ravel())[0]
    return best[1]


def gaussian() -> None:
    few, many = samples(384, LENGTH, seed=0), samples(2048, LENGTH, seed=1)
    for bits, width, states in CODES:
        each = (lloyd(bits, width, states, few, seed) for seed in range(STARTS))
        table = max(each, key=lambda pair: pair[0])[1]
        db = coded(bits, states, table, many)[0]
        print(f"{bits / width:g} bits ({bits} for {width}), {states} states: {db:.2f} dB")
        for terms in TERMS if width == 1 else ():
            db = coded(1, states, cut(states, table, terms, few), many)[0]
            print(f"    {terms} parities: {db:.2f} dB", flush=True)


def spectra() -> None:
    """Sizes in half bits, so that 1.5 bits are a size; others between whole ones do not exist."""
    window = distortion_curve("window", 64)

    def half_bits(better: dict[float, float]) -> np.ndarray:
        curve = np.repeat(window, 2)[: 2 * len(window) - 1]  # as good as the whole size below
        for bits, db in better.items():
            curve[int(2 * bits)] = 10 ** (-db / 10)
        return curve

    curves = {
        "window": half_bits({}),
        "1 bit": half_bits({1: ONE_BIT}),
        "1.5 bits": half_bits({1.5: BIT_AND_A_HALF}),
        "both": half_bits({1: ONE_BIT, 1.5: BIT_AND_A_HALF}),
    }
    for ratio in (1.0, 0.97, 0.92, 0.85):
        v = ratio ** np.arange(64)
        rates = batched_rates(np.stack([v[:, None] * curve for curve in curves.values()]))
        for bits in (1, 1.25, 1.5, 1.75, 2.25, 3.25):
            error = [rate.error[rate.at(int(2 * 64 * bits))] for rate in rates]
            over = [f"{n} {e / error[0]:.3f}" for n, e in zip(curves, error, strict=True)][1:]
            print(f"variances {ratio:g}^i, {bits} bits: {', '.join(over)}")


def plans(folder: str) -> None:
    statistics = load_statistics(folder)
    geometry = statistics.geometry
    as_it_is = distortion_curve("window", 64)
    better = as_it_is.copy()
    better[1] = 10 ** (-ONE_BIT / 10)
    costs: dict[str, list[float]] = {}
    for name, curve in (("as it is", as_it_is), ("1 bit better", better)):
        with mock.patch("turboq.codecs.fit_transform.distortion_curve", lambda *_, c=curve: c):
            wanted = Wanted(budget=Budget.parse(f"{BUDGETS[-1]}bpc"))
            ready = menu(statistics, geometry, wanted, progress=False)
        costs[name] = []
        for bits in BUDGETS:
            problem, found = solve(ready, Wanted(budget=Budget.parse(f"{bits}bpc")))
            costs[name].append(problem.cost(found.chosen))
            codecs = [
                ready.table.options[u.layer, u.side][c].codecs[u.head]
                for u, c in zip(ready.table.units, found.chosen, strict=True)
            ]
            ones = sum(width for codec in codecs for width, b in codec.segments if b == 1)
            print(f"{name}, {bits} bits: {costs[name][-1]:.5f} nats predicted, "
                  f"{ones / ready.table.channels:.1%} of the coordinates have 1 bit")  # fmt: skip
    for bits, a, b in zip(BUDGETS, *costs.values(), strict=True):
        print(f"{bits} bits: {b / a:.3f} of the predicted loss")


def main(argv: list[str]) -> None:
    del argv
    gaussian()
    spectra()
    if STATISTICS.value:
        plans(STATISTICS.value)


if __name__ == "__main__":
    app.run(main)
