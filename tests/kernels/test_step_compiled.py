"""A whole step of a layer compiled for chips that are not here: few launches, nothing copied."""

import dataclasses
import json
from pathlib import Path

import pytest
from compiled import RECORDING, compiled, needs_compilers

from turboq_kernels.aot import compilers, cuda, cuda_step, launches, step, tpu, tpu_step

# Packed K and V of 8 sequences, 8 heads, 32,768 tokens: 128 coordinates of 3 bits, and a scale.
BATCH_BYTES = 2 * 8 * 8 * 32768 * (128 * 3 + 16) // 8

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "experiments" / "results" / "kernel_costs.json"
MODULES = {"tpu": tpu_step, "cuda": cuda_step}
# Launches; those of window codes ("window", keys in "blocks", "joined" heads, and these with keys
# before RoPE) are in the one pool. On TPU the tables of heads of `per_head` are laid out anew.
MOST = {
    ("sm_90", "turboquant_mse"): 10, ("sm_90", "per_head"): 10, ("sm_90", "window"): 10,
    ("sm_90", "blocks"): 10, ("sm_90", "joined"): 10, ("sm_90", "joined_before"): 10,
    ("v5e", "bfloat16_scales"): 10, ("v5e", "turboquant_mse"): 10, ("v5e", "per_head"): 20,
    ("v5e", "joined_before"): 10,
}  # fmt: skip


# Of each platform the step of most parts; all while digests are recorded.
LOWERED = {"tpu": ["per_head", "joined_before"], "cuda": ["per_head", "joined_before"]}


def key(row):
    return row["target"], row["levels"], row["tokens"]


@pytest.fixture(scope="module")
def recorded():
    return {key(row): row for row in json.loads(COSTS.read_text()) if row["op"] == "step"}


@needs_compilers
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_launches_have_not_grown(platform, recorded):
    module = MODULES[platform]
    of = {
        key(dataclasses.asdict(c)): c
        for c in module.CONFIGURATIONS
        if RECORDING or (c.levels in LOWERED[platform] and c.tokens == 1)
    }

    def compile(keys):
        return compilers.rows(module.__name__, platform, [of[k] for k in keys])

    def lower(k):
        program = module.program(of[k])
        return tpu.lowered(k[0], program) if platform == "tpu" else cuda.lowered(program)

    for k, row in compiled("step", platform, of, lower, compile, recorded).items():
        assert 0 < row["launches"] <= recorded[k]["launches"], row


def test_recorded_rows(recorded):
    """As few launches as promised; pools are written in place, no buffer is copied or unpacked."""
    assert set(recorded) == {
        key(dataclasses.asdict(c)) for module in MODULES.values() for c in module.CONFIGURATIONS
    }
    for (target, levels, tokens), row in recorded.items():
        assert row["in_place"], row
        if tokens > 1:
            # Of XLA 1,316 MiB on a GPU and 2,430 on a TPU: the whole history, and logits.
            history = 2 * 2 * row["dim"] * step.HEADS * step.PAGES * step.PAGE
            assert row["temporary_bytes"] < 2 * history, row
            continue
        assert row["copied_bytes"] < row["buffer_bytes"], row
        assert row["launches"] <= MOST.get((target, levels), row["launches"]), row
        if target == "sm_90":  # nothing of a step around the kernel that reads what is stored
            around = ("turboq_append", "turboq_prepare", "turboq_finish")
            assert [row["spills"][name] for name in around] == [0, 0, 0], row
        if levels in step.CODECS:
            # Of K and V: nothing of their size is made.
            assert row["temporary_bytes"] < BATCH_BYTES / 10, row


HLO = """
HloModule jit_run, is_scheduled=true

%inside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.9 = f32[8]{0} add(%p, %p)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %loop_fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %loop_fusion.3)
}

%cond (s: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] fusion(%s.1), kind=kLoop, calls=%inside
}

%nothing (p.1: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}

ENTRY %main (a: bf16[4,8], b: f32[8]) -> f32[8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %copy.1 = bf16[4,8]{0,1} copy(%a)
  %copy-start.1 = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%b)
  %copy-done.1 = f32[8]{0:S(1)} copy-done(%copy-start.1)
  %view = f32[8]{0} custom-call(%b), custom_call_target="ConcatBitcast"
  %bitcast.7 = f32[8]{0} bitcast(%view)
  %kernel.5 = (f32[8]{0}, f32[2]{0}) custom-call(%b), metadata={op_name="turboq_decode/pallas_call"}
  %w = (s32[], f32[8]{0}) while(%t.1), condition=%cond, body=%body, b={"known_trip_count":{"n":"3"}}
  %c = f32[8]{0} conditional(%i, %b, %b), branch_computations={%nothing, %inside}
  ROOT %call.2 = f32[8]{0} call(%b), to_apply=%inside
}
"""


def test_reads_a_program():
    """By hand: copy, kernel, three times condition and body, the dearer branch, the callee."""
    found = launches.read(HLO)
    assert found.names == {"copy": 1, "turboq_decode": 1, "loop_fusion": 3, "lt": 3, "add": 2}
    assert (found.count, found.ahead, found.copied_bytes) == (10, 1, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HLO.replace("ENTRY ", ""), "no ENTRY"),
        (HLO.replace("known_trip_count", "trips"), "loop w runs an unknown number of times"),
    ],
)
def test_unknown_programs(text, message):
    with pytest.raises(ValueError, match=message):
        launches.read(text)
