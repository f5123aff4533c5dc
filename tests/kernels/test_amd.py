"""AMD's cards: what they are told to run is none of NVIDIA's, and what was recorded of them."""

import json
import re
import warnings
from pathlib import Path

import pytest
from unchecked import unchecked

from turboq_kernels.aot import (
    code_object,
    compilers,
    cuda,
    cuda_columns,
    cuda_prefill,
    cuda_window,
    rocm,
    rocm_stubs,
)

COSTS = Path(__file__).parents[2] / "experiments" / "results" / "amd_costs.json"
# An instruction of NVIDIA's with its type, as in "prmt.b32" or "ex2.approx.ftz.f32".
PTX = re.compile(r"\b[a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.[bfsu](?:8|16|32|64)\b")
PROGRAMS = {
    "columns": lambda: cuda_columns.program(cuda_columns.Configuration(target="", bits=2)),
    "decode": lambda: cuda.program(cuda.Configuration(bits=2, dim=64)),
    "prefill": lambda: cuda_prefill.program(cuda_prefill.Configuration(bits=2, dim=64)),
    "window": lambda: cuda_window.program(cuda_window.Configuration(states=16)),
}


@pytest.mark.parametrize("op", PROGRAMS)
def test_a_lowering_for_amd_holds_no_ptx(op):
    """By the target of the lowering: this machine has no GPU at all."""
    with unchecked(), warnings.catch_warnings():  # shapes stand for arrays
        program = PROGRAMS[op]()
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        assert PTX.search(compilers.lowered(program, "cuda", cuda.DEVICE))
        found = PTX.search(compilers.lowered(program, "rocm", rocm.device("gfx942")))
    assert found is None, found


def test_the_stubs_say_that_there_is_no_device():
    text = rocm_stubs.source(["hipInit", "hipGetErrorString"])
    assert "long hipInit(void) { return 100; }" in text
    assert 'const char *hipGetErrorString(void) { return ""; }' in text


CODE = """
0000000000001e00 <turboq_columns>:
\ts_mov_b32 s52, s3                                 // 000000001E00: BEB40003
\tv_mov_b32_e32 v53, v0                             // 000000001E04: 7E6A0300
\tv_perm_b32 v1, v2, v3, v4                         // 000000001E08: D1ED0001 04120702
\ts_cbranch_scc1 65533                              // 000000001E10: BF85FFFD <turboq_columns+0x8>
\ts_cbranch_scc1 1                                  // 000000001E14: BF850001 <turboq_columns+0x1c>
\ts_branch 65530                                    // 000000001E18: BF82FFFA <turboq_columns+0x4>
\ts_endpgm                                          // 000000001E1C: BF810000
"""


def test_the_largest_loop_of_a_disassembly():
    """Of two loops within each other the outer; a branch forward is none."""
    loop = code_object.largest_loop(CODE)
    assert loop == ["v_mov_b32_e32", "v_perm_b32", "s_cbranch_scc1", "s_cbranch_scc1", "s_branch"]
    with pytest.raises(ValueError, match="no instruction"):
        code_object.largest_loop("file format elf64-amdgpu")


def test_what_is_recorded():
    """Every row can be repeated, and bit columns are there for every target."""
    rows = {(row["target"], row["op"]): row for row in json.loads(COSTS.read_text())}
    assert set(rows) <= {(c.target, c.op) for c in rocm.CONFIGURATIONS}
    for target in rocm.CARDS:
        row = rows[target, "columns"]
        assert row["instructions_per_element"] > 1, row
        assert row["versions"].startswith("jax "), row
    assert rows["gfx942", "columns"]["vgpr_spills"] == 0
