"""Codecs that say they are linear in their bits: mean and M bits in float64 against `decode`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import HEADS, ROWS, cell
from tolerances import TOL

from turboq.codecs.bit_form import LEVELS, bits_of

LINEAR = {
    "int_affine-4": False,  # two groups of channels have no `reading`
    "int8-token-head": True,
    "kvarn-2-token": False,
    "transform-window": True,
    "transform-window-gain": True,
    "transform-scalar": False,
    "transform-trellis-gain": False,
    "prod-1-orthogonal": True,
    "prod-3": False,
    "mse-3": False,
    "fp8-e4m3-token": False,
}


def of_head(tree, h):
    return jax.tree.map(lambda x: jnp.asarray(x[h]), tree)


def rebuilt(codec, arrays, form, stored):
    """The formula of `turboq.codecs.bit_form`, float64."""

    def number(name, default):
        if name is None:
            return default
        return np.asarray(codec.row_values(arrays, name, stored[name][..., 0]), np.float64)

    x = np.asarray(form.mean, np.float64)[None, :]
    for part in form.parts:
        m, constant, ones = (
            np.asarray(a, np.float64) for a in (part.matrix, part.constant, part.ones)
        )
        inner = bits_of(part, stored).astype(np.float64) @ m.T + constant
        x = x + np.reshape(number(part.scale, 1.0), (-1, 1)) * inner
        x = x + np.reshape(number(part.offset, 0.0), (-1, 1)) * ones
    return x


@pytest.mark.parametrize("name", ROWS)
def test_bits_times_matrix_is_what_decodes(name):
    c = cell(name, 64)
    codec = c["codec"]
    for h in range(HEADS):
        arrays, stored = (of_head(c[k], h) for k in ("arrays", "stored"))
        form = jax.jit(codec.bit_form)(arrays)
        assert (form is not None) == LINEAR.get(name, form is not None)
        if form is None:
            reading = codec.reading
            assert reading is None or any(p.levels not in LEVELS for p in reading.parts)
            continue
        widths = {f.name: f.bits_per_row for f in codec.fields if f.packed}
        assert sum(p.matrix.shape[1] for p in form.parts) == sum(widths.values())
        got = rebuilt(codec, arrays, form, stored)
        size = np.abs(c["decoded"][h]).max()
        assert np.max(np.abs(got - c["decoded"][h])) < TOL["transform_float64"] * size
