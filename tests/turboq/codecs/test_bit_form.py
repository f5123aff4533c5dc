"""Codecs that say they are linear in their bits: mean and M bits in float64 against `decode`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import HEADS, ROWS, cell
from tolerances import TOL

from turboq.codecs import PerHead, TurboQuantMSE
from turboq.codecs.bit_form import LEVELS, TABLE_BITS, bits_of

LINEAR = {
    "int_affine-4": False,  # two groups of channels have no `reading`
    "int8-token-head": True,
    "kvarn-2-token": False,
    "transform-window": True,
    "transform-window-gain": True,
    "transform-scalar": True,
    "transform-trellis-gain": False,
    "prod-1-orthogonal": True,
    "prod-3": True,
    "mse-3": True,
    "mse-8-identity": False,
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
    formed = jax.jit(codec.bit_form)
    for h in range(HEADS):
        arrays, stored = (of_head(c[k], h) for k in ("arrays", "stored"))
        form = formed(arrays)
        assert (form is not None) == LINEAR.get(name, form is not None)
        if form is None:
            reading = codec.reading
            assert reading is None or any(
                p.levels not in LEVELS and (p.levels != "table" or p.bits > TABLE_BITS)
                for p in reading.parts
            )
            continue
        widths = {f.name: f.width for f in codec.fields if f.packed}
        columns = [
            widths[name] * (bits + len(more))
            for p in form.parts
            for name, bits, more in zip(p.fields, p.bits, p.derived, strict=True)
        ]
        assert sum(p.matrix.shape[1] for p in form.parts) == sum(columns)
        got = rebuilt(codec, arrays, form, stored)
        size = np.abs(c["decoded"][h]).max()
        assert np.max(np.abs(got - c["decoded"][h])) < TOL["transform_float64"] * size


@pytest.mark.parametrize(("bits", "columns"), [(1, 0), (2, 0), (3, 1), (4, 4)])
def test_symmetric_tables_need_parities_of_odd_subsets_only(bits, columns):
    """As many derived columns as stated; every one of them is needed from 3 bits on."""
    form = TurboQuantMSE(dim=16, bits=bits).bit_form({})
    assert form is not None
    (part,) = form.parts
    assert len(part.derived[0]) == columns
    own = np.asarray(part.matrix).reshape(16, 16, bits + columns)
    assert np.all(np.abs(own[:, :, bits:]).max(axis=(0, 1)) > 1e-3)
    codec = PerHead(dim=16, bits=bits)
    arrays = {"mean": jnp.zeros(16), "codebook": jnp.arange(2.0**bits) ** 1.5}
    form = codec.bit_form(arrays)
    assert form is not None
    assert len(form.parts[0].derived[0]) == 2**bits - 1 - bits
