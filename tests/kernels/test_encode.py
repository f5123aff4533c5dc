"""The encode oracle against float64 and the codecs' own `encode`; who writes cache pages."""

from typing import Any

import encode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import CODECS
from turboq.codecs.base import Codec
from turboq.codecs.writing import Run, Writing
from turboq_kernels.encode import base
from turboq_kernels.encode.types import word_fields

# A program is run once: it compiles faster without optimization.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Cases for kernels: here they differ from others in numbers only.
ALIKE = ("mse_1", "mse_2", "mse_4", "prod_float32", "hadamard_head", "transform_none")
encoded = jax.jit(base.encode, static_argnums=0, compiler_options=FAST)


def test_every_codec_with_a_writing_has_a_case():
    made = {cases.CODECS[name](64).name for name in cases.CODECS}
    assert made == {name for name, codec in CODECS.items() if codec.writing is not Codec.writing}


@pytest.mark.parametrize("name", [name for name in cases.CODECS if name not in ALIKE])
def test_base_and_codec(name):
    """Both are float64's up to rounding, so they differ only where that decides."""
    case = cases.make_case(name, tokens=40, starts=(0, 0))
    codes, rows = encoded(case.writing, case.tables, case.x)
    cases.check_codes(case.writing, case.tables, case.x, codes, rows)
    theirs = jax.vmap(case.codec.encode, in_axes=(0, 1), out_axes=1)
    stored = jax.jit(theirs, compiler_options=FAST)(case.arrays, case.x)
    fields = word_fields(case.writing)
    theirs = [stored[f][..., 0].astype(jnp.float32) for f in case.writing.rows]
    own = [stored[f] for f in fields]
    cases.check_codes(case.writing, case.tables, case.x, own, theirs)
    for field, ours in zip(fields, codes, strict=True):
        assert np.mean(np.asarray(ours) != np.asarray(stored[field])) <= TOL["unclear_share"]


@pytest.mark.parametrize("bad", ["code", "scale", "sign"])
def test_the_checker_sees_an_error(bad):
    """One code of a neighbour, a scale one unit too large, one sign."""
    case = cases.make_case("prod_3", tokens=3, starts=(0,))
    codes, rows = encoded(case.writing, case.tables, case.x)
    codes, rows = [np.array(c) for c in codes], [np.array(r) for r in rows]
    if bad == "code":
        codes[0][0, 1, 2, 5] ^= 1
    elif bad == "scale":
        rows[0][0, 1, 2] = np.nextafter(np.float16(rows[0][0, 1, 2]), np.float16(np.inf))
    else:
        codes[1][0, 1, 2, 5] ^= 1
    with pytest.raises(AssertionError, match={"code": "part 0", "sign": "signs"}.get(bad, bad)):
        cases.check_codes(case.writing, case.tables, case.x, codes, rows)


def test_a_writing_is_consistent():
    part = Run(field="codes", width=8, bits=2)
    good: dict[str, Any] = {"parts": (part,)}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gain": "log"}, "self.gain='log'"),
        ({"rule": "best"}, "self.rule='best'"),
        ({"gain": "rms"}, "self.scale=None"),
        ({"scale": "scale"}, "self.scale='scale'"),
        ({"gain_bits": 2}, "self.gain_bits=2"),
        ({"signs": "signs"}, "self.gamma=None"),
        ({"signs": "signs", "gamma": "gamma"}, "must be 'rms' with a sketch"),
        ({"parts": ()}, "at least one part"),
    )
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            Writing(**(good | fields))
