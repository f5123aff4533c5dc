"""The column kernels compiled for chips that are not here: they compile, and cost no more."""

import dataclasses
import json
from pathlib import Path

import pytest
from compiled import compiled, needs_compilers

from turboq_kernels.aot import compilers, cuda, cuda_columns, cuda_decoded, tpu, tpu_columns

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "experiments" / "results" / "kernel_costs.json"
KEYS = ("target", "bits", "dim", "group", "tokens", "cache", "joined")


def key(row):
    return tuple(str(row[k]) for k in KEYS)


def rows_of(op):
    return {key(row): row for row in json.loads(COSTS.read_text()) if row["op"] == op}


@pytest.fixture(scope="module")
def recorded():
    return rows_of("columns")


@needs_compilers
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_costs_have_not_grown(platform, recorded):
    """5 % room for another compiler; a better kernel is recorded with scripts/kernel_costs.py."""
    module = {"tpu": tpu_columns, "cuda": cuda_columns}[platform]
    some = [next(c for c in module.CONFIGURATIONS if c.bits == 3)]
    if platform == "tpu":  # joined heads' keys, decoded
        some.append(next(c for c in module.CONFIGURATIONS if c.decoded and c.joined > 1))
    by_key = {key(dataclasses.asdict(c)): c for c in some}

    def compile(keys):
        return compilers.rows(module.__name__, platform, [by_key[k] for k in keys])

    def lower(one):
        c, program = by_key[one], module.program(by_key[one])
        return tpu.lowered(c.target, program) if platform == "tpu" else cuda.lowered(program)

    cost = "bundles_per_256_tokens" if platform == "tpu" else "instructions_per_element"
    for one, row in compiled("columns", platform, by_key, lower, compile, recorded).items():
        known = recorded[one]
        # Faster than believable is a loop that was not found.
        assert 0.7 * known[cost] <= row[cost] <= 1.05 * known[cost], (row, known)
        assert row.get("spill_bytes", 0) == 0


def test_every_configuration_is_recorded(recorded):
    among = (*tpu_columns.CONFIGURATIONS, *cuda_columns.CONFIGURATIONS)
    assert set(recorded) == {key(dataclasses.asdict(c)) for c in among}
    # Bits are data, and so are heads: twice the query rows cost no more on a TPU.
    rows = {(r["group"], r["tokens"]): r for r in recorded.values()
            if (r["target"], r["bits"], r["cache"]) == ("v5e", 3, "256")}  # fmt: skip
    assert rows[8, 1]["loop_bundles"] <= 1.02 * rows[4, 1]["loop_bundles"]


@needs_compilers
def test_keys_are_decoded_without_spills():
    """One configuration compiled; none recorded spills, two programs share a multiprocessor."""
    known, (one, *_) = rows_of("logits"), cuda_decoded.CONFIGURATIONS
    assert set(known) == {key(dataclasses.asdict(c)) for c in cuda_decoded.CONFIGURATIONS}
    for row in known.values():
        assert row["spill_bytes"] == 0
        assert row["residency"] >= 2
        assert row["loads_ahead"] > 0
    name = key(dataclasses.asdict(one))
    (row,) = compiled(
        "logits", "cuda", [name], lambda _: cuda.lowered(cuda_decoded.program(one)),
        lambda _: compilers.rows(cuda_decoded.__name__, "cuda", [one]), known,
    ).values()  # fmt: skip
    assert row["spill_bytes"] == 0
    assert row["instructions_per_element"] <= 1.05 * known[name]["instructions_per_element"]
