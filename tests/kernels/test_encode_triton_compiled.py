"""The Triton encode kernel compiled for an H100 on this machine: no spills, no copies, its cost."""

import json
from pathlib import Path

import pytest
from compiled import needs_compilers

from turboq_kernels.aot import compilers
from turboq_kernels.aot.cuda_encode import CONFIGURATIONS

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "experiments" / "results" / "kernel_costs.json"

# Every configuration is recorded; these are compiled again here (each takes 1-2 s).
COMPILED = {
    (3, "table", 128, 1), (3, "table", 128, 256), (4, "table", 256, 256), (2, "table", 64, 256),
    (3, "table+sign", 256, 256),
}  # fmt: skip

COMMAND = f"""
import json
from turboq.codecs import PerHead, TurboQuantMSE, TurboQuantProd
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq_kernels.aot import cuda_encode as aot
rows = [
    aot.row(c) for c in aot.CONFIGURATIONS if (c.bits, c.levels, c.dim, c.tokens) in {COMPILED!r}
]
layer = uniform_layer(
    kv_heads=8, policy=TokenPolicy(sinks=4, recent=64), k=TurboQuantProd(dim=128, bits=3),
    v=TurboQuantMSE(dim=128, bits=2),
)
memory = []
for tokens in (1, 256):
    found = aot.compile_layer(layer, tokens=tokens, capacity=65536).memory_analysis()
    memory.append([found.alias_size_in_bytes, found.temp_size_in_bytes])
odd = aot.compile_write(aot.Configuration(bits=4, dim=80, tokens=40), page=64)
print(json.dumps({{"rows": rows, "memory": memory, "odd": odd.spill_bytes}}))
"""


def key(row):
    return row["bits"], row["levels"], row["dim"], row["tokens"]


@pytest.fixture(scope="module")
def compiled():
    found = json.loads(compilers.printed(COMMAND, "cuda").splitlines()[-1])
    return found | {"rows": {key(row): row for row in found["rows"]}}


@pytest.fixture(scope="module")
def recorded():
    found = json.loads(COSTS.read_text())
    return {key(row): row for row in found if row["target"] == "sm_90" and row["op"] == "encode"}


@needs_compilers
def test_compiles_without_spills(compiled):
    assert set(compiled["rows"]) == COMPILED
    for row in compiled["rows"].values():
        assert row["spill_bytes"] == 0, row
        assert 48 <= row["registers"] <= 255, row
    assert compiled["odd"] == 0


@needs_compilers
def test_costs_have_not_grown(compiled, recorded):
    """5 % room for another compiler; a better kernel is recorded with scripts/kernel_costs.py."""
    for name, row in compiled["rows"].items():
        for field in ("instructions_per_element", "registers"):
            assert row[field] <= 1.05 * recorded[name][field], (row, recorded[name])
        # Faster than believable is a loop that was not found.
        assert row["instructions_per_element"] >= 0.7 * recorded[name]["instructions_per_element"]


def test_every_configuration_is_recorded_without_spills(recorded):
    assert set(recorded) == {(c.bits, c.levels, c.dim, c.tokens) for c in CONFIGURATIONS}
    assert all(row["spill_bytes"] == 0 for row in recorded.values())


@needs_compilers
def test_a_donated_cache_is_written_in_place(compiled):
    """All buffers of 65536 tokens are aliased; what else is needed is smaller than any of them."""
    codes = 2 * 8 * 65536 * 128 // 8  # bytes of one plane: sequences, heads, tokens, D
    exact = 2 * 2 * 8 * (4 + 64) * 128 * 2
    rows = 3 * 2 * 8 * 65536 * 2  # scale and gamma of K, scale of V
    for aliased, temporary in compiled["memory"]:
        assert aliased >= (2 + 1 + 2) * codes + rows + exact
        assert temporary < codes // 2
