"""The search of window codes compiled for an H100 on this machine: in registers, at its cost."""

import dataclasses
import json
from pathlib import Path

import pytest
from compiled import compiled, needs_compilers

from turboq_kernels.aot import compilers, cuda, cuda_window
from turboq_kernels.aot.cuda_window import CODES, CONFIGURATIONS, POOL

COSTS = Path(__file__).parents[2] / "experiments" / "results" / "kernel_costs.json"
COMPILED = {(16, CODES), (64, POOL)}  # the others are recorded


def key(row):
    return row["states"], row["cache"]


@pytest.fixture(scope="module")
def recorded():
    return {key(row): row for row in json.loads(COSTS.read_text()) if row["op"] == "window"}


@needs_compilers
def test_costs_have_not_grown(recorded):
    """5 % room for another compiler; a better kernel is recorded with scripts/kernel_costs.py."""
    of = {key(dataclasses.asdict(c)): c for c in CONFIGURATIONS}
    keys = [k for k in of if k in COMPILED]
    assert set(keys) == COMPILED

    def compile(names):
        among = [of[name] for name in names]
        return compilers.rows("turboq_kernels.aot.cuda_window", "cuda", among)

    def lower(name):
        return cuda.lowered(cuda_window.program(of[name]))

    for k, row in compiled("window", "cuda", keys, lower, compile, recorded).items():
        known = recorded[k]["instructions_per_state"]
        # Faster than believable is a loop that was not found.
        assert 0.7 * known <= row["instructions_per_state"] <= 1.05 * known, row
        assert row["registers"] <= 1.05 * recorded[k]["registers"], row
        assert row["spill_bytes"] == 0, row


def test_every_configuration_is_recorded_in_registers_alone(recorded):
    assert set(recorded) == {key(dataclasses.asdict(c)) for c in CONFIGURATIONS}
    for row in recorded.values():
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= 4096, row  # of sums before and after the search
    # A state costs no more where a lane has more of them.
    costs = [recorded[states, CODES]["instructions_per_state"] for states in (16, 64, 256)]
    assert costs == sorted(costs, reverse=True)
