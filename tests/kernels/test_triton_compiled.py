"""The Triton decode kernel compiled for an H100 on this machine: no spills, no costlier."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from compiled import compiled, needs_compilers

from turboq_kernels.aot import compilers, cubin, cuda
from turboq_kernels.decode import triton

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "experiments" / "results" / "kernel_costs.json"

# Every configuration is recorded; these are compiled again here (each takes 1-2 s).
COMPILED = {(3, "table", 128, 8), (4, "table", 64, 8), (3, "table", 256, 8), (8, "e4m3", 128, 8)}


def key(row):
    return row["bits"], row["levels"], row["dim"], row["group"]


@pytest.fixture(scope="module")
def rows(recorded):
    of = {key(dataclasses.asdict(c)): c for c in cuda.CONFIGURATIONS}
    of = {name: c for name, c in of.items() if name in COMPILED}

    def compile(names):
        return compilers.rows("turboq_kernels.aot.cuda", "cuda", [of[name] for name in names])

    def lower(name):
        return cuda.lowered(cuda.program(of[name]))

    return compiled("decode", "cuda", of, lower, compile, recorded)


@pytest.fixture(scope="module")
def recorded():
    found = json.loads(COSTS.read_text())
    return {key(row): row for row in found if row["target"] == "sm_90" and row["op"] == "decode"}


@needs_compilers
def test_compiles_without_spills(rows):
    assert set(rows) == COMPILED
    for row in rows.values():
        assert row["spill_bytes"] == 0, row
        assert 64 <= row["registers"] <= 255, row


@needs_compilers
def test_costs_have_not_grown(rows, recorded):
    """5 % room for another compiler; a better kernel is recorded with scripts/kernel_costs.py."""
    for name, row in rows.items():
        for field in ("instructions_per_element", "registers"):
            assert row[field] <= 1.05 * recorded[name][field], (row, recorded[name])
        # Faster than believable is a loop that was not found.
        assert row["instructions_per_element"] >= 0.7 * recorded[name]["instructions_per_element"]


def test_every_shipped_configuration_is_recorded(recorded):
    """None spills, every one loads ahead, and as many run at a time as splits are made for."""
    for c in cuda.CONFIGURATIONS:
        row = recorded[key(dataclasses.asdict(c))]
        _, k, v, *_ = cuda.shapes(c, rows=max(8, c.group))
        assert row["spill_bytes"] == 0
        assert row["loads_ahead"] > 0
        assert row["residency"] == triton.tuning(k, v, max(8, c.group)).residency, row


def test_waits_of_known_code():
    """DEPBAR.LE SB0, 0x0 and SB0, 0x7 as two kernels of CUDA 13 hold them."""
    waits = {0: (0x80000000791A, 0xFC80000000000), 7: (0x81C00000791A, 0xFC80000000000)}
    for groups, words in waits.items():
        code = bytes(32) + struct.pack("<QQ", *words) + bytes(16)
        assert cubin.loads_ahead(code, 0, 4) == groups
        assert cubin.loads_ahead(code, 3, 4) == 0
    both = b"".join(struct.pack("<QQ", *words) for words in waits.values())
    assert cubin.loads_ahead(both, 0, 2) == 0


def test_launch_of_known_bytes():
    """A kernel of 128 threads and 53,248 bytes, then one without shared memory."""
    tail = b'\x1a\x08\x12\x06\x08\x19\x10\x08\x18\x02"\x09\x0a\x07\x08\x80\x01\x10\x01\x18\x01'
    named = b'"\x03one*\x04\x0a\x02\x08\x01' + tail + b"\x30\x80\xa0\x03 \x01"
    other = b'"\x03two*\x04\x0a\x02\x08\x01' + tail + b" \x012\x00"
    assert cubin.launch(named + other, "one") == (128, 53248)
    assert cubin.launch(named + other, "two") == (128, 0)
    assert cubin.launch(named + other, "three") == (0, 0)


def test_residency():
    """By hand: registers bind at 165 (168 x 128 of 65,536: 3) and 173, shared memory at 110,000."""
    cost = cubin.Cost(
        registers=165, spill_bytes=0, instructions=1, loop_instructions=1, loads_ahead=0,
        threads=128, shared_bytes=65568,
    )  # fmt: skip
    assert cost.residency == 3
    assert dataclasses.replace(cost, registers=173).residency == 2
    assert dataclasses.replace(cost, registers=64, shared_bytes=110_000).residency == 2
    assert dataclasses.replace(cost, registers=16, shared_bytes=0).residency == 16


def test_largest_loop_of_known_code():
    """Instructions as a disassembler of CUDA 13 shows them: offset and target of three branches."""

    def code(length, branches):
        out = bytearray(16 * length)
        for at, text in branches.items():
            value = int(text, 16)
            struct.pack_into("<QQ", out, at, value & (1 << 64) - 1, value >> 64)
        return bytes(out)

    # 0x580: to 0x44a0; 0x4480: back to 0xca0 = 895 instructions; 0x49e0: to itself.
    known = {
        0x580: "fea00038000000000003c00c48947",
        0x4480: "fec000383ffffffffffc800040947",
        0x49E0: "fc0000383fffffffffffc00fc7947",
    }
    assert cubin.largest_loop(code(0x4A0, known)) == (0xCA, 0x449)
    assert cubin.largest_loop(code(0x4A0, {0x49E0: known[0x49E0]})) == (0, 0)


def test_executable_without_a_kernel():
    with pytest.raises(ValueError, match="no ELF in an executable of 9 bytes"):
        cubin.costs(b"not a file"[:9])
