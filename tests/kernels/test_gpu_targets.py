"""Other NVIDIA targets than sm_90: what programs are traced for, and what is refused by name."""

import struct

import jax
import pytest

from turboq_kernels.aot import cards, compilers, cubin, cuda
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
