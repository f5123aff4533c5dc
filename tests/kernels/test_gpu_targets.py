"""Other NVIDIA targets than sm_90: what programs are traced for, and what is refused by name."""

import json
import struct
from pathlib import Path

import jax
import pytest
from compiled import compiled, needs_compilers

from turboq_kernels.aot import cards, compilers, cubin, cuda, cuda_columns, cuda_targets
from turboq_kernels.target import target

REFUSED = {(sm, levels) for sm in ("sm_80", "sm_89") for levels in ("int8", "e4m3")}


@pytest.mark.parametrize("sm", cards.CARDS)
def test_a_card_is_what_programs_are_traced_for(sm):
    with compilers.abstractly(cards.device(sm)):
        seen = target()
    number = seen.capability[0] * 10 + seen.capability[1]
    assert (f"sm_{number}", seen.ptx) == (sm, True)
    assert seen.processors == cards.CARDS[sm].processors
    text = cards.config(sm)
    assert f"major: {number // 10} minor: {number % 10}" in text
    assert f"core_count: {seen.processors}\n" in text


@pytest.mark.parametrize(("sm", "levels"), sorted(REFUSED))
def test_refused_by_name(sm, levels):
    """When traced: no compiler is asked."""
    program = cuda.program(cuda.Configuration(bits=8, levels=levels))
    message = f"as {levels} needs sm_90, this GPU is {sm}"
    with compilers.abstractly(cards.device(sm)), pytest.raises(ValueError, match=message):
        jax.eval_shape(program.function, *program.arguments)


def test_a_card_of_no_number():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA X", num_cores=None, platform="gpu")
    with compilers.abstractly(device):
        assert target().capability is None


@pytest.mark.parametrize("apart", [0, 8])
def test_a_loop_is_found_in_old_and_new_code(apart):
    """40 instructions, of which the last but one jumps back by 30: 128 bits, distance / 4 at 34."""
    words = -4 * 30
    branch = 0x947 | (words & (1 << apart) - 1) << 16 | (words >> apart & (1 << 48) - 1) << 34
    code = bytes(38 * 16) + struct.pack("<QQ", branch & (1 << 64) - 1, branch >> 64) + bytes(16)
    assert cubin.largest_loop(code) == (9, 39)


TARGETS = Path(__file__).parents[2] / "experiments" / "results" / "gpu_targets.json"


def test_what_is_recorded_is_counted_or_refused_by_name():
    """Every row can be repeated; nothing spills; what a card cannot do is there with its reason."""
    rows, found = json.loads(TARGETS.read_text()), set()
    for row in rows:
        levels = row["levels"] if "refused" in row or row.get("bits") == 8 else ""
        found.add((row["target"], row["op"], levels))
        if (row["target"], levels) in REFUSED:
            assert f"as {levels} needs sm_90" in row["refused"], row
        else:
            assert "refused" not in row, row
            assert row.get("spill_bytes", 0) == 0, row
    assert found <= {(c.target, c.op, c.levels) for c in cuda_targets.CONFIGURATIONS}
    assert {("decode", levels, sm) for sm, levels in REFUSED} <= {(o, x, sm) for sm, o, x in found}
    assert {sm for sm, op, _ in found if op == "columns"} == set(cards.CARDS) - {"sm_90"}


@needs_compilers
def test_bit_columns_cost_no_more_on_an_old_card():
    """sm_80, compiled now unless its program is as it was; 5 % room for another compiler."""
    rows = {(r["target"], r["op"]): r for r in json.loads(TARGETS.read_text())}
    one = cuda_targets.Configuration(target="sm_80", op="columns")
    known = rows["sm_80", "columns"]

    def compile(_):
        return compilers.rows("turboq_kernels.aot.cuda_targets", "cuda", [one])

    def lower(_):
        c = cuda_columns.Configuration(target="sm_80", bits=3)
        return compilers.lowered(cuda_columns.program(c), "cuda", cards.device("sm_80"))

    found = compiled("targets", "cuda", ["sm_80 columns"], lower, compile, {"sm_80 columns": known})
    (row,) = found.values()
    cost = "instructions_per_element"
    assert 0.7 * known[cost] <= row[cost] <= 1.05 * known[cost], (row, known)
    assert row["spill_bytes"] == 0
