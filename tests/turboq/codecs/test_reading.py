"""What a codec tells kernels about its words, against what the codec itself reads from them."""

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from codec_rows import HEADS, ROWS, cell
from tolerances import TOL

from turboq.codecs import FP8, IntAffine, PerHead, TurboQuantMSE
from turboq.codecs.reading import Part, Reading
from turboq.errors import TurboqError

READ = [name for name, row in ROWS.items() if row.make(64).reading is not None]


def stored_values(codec, arrays, stored):
    """Values [S, C] of one head in float64, by the formula of `turboq.codecs.reading`."""
    pieces = []
    for part, table in zip(codec.reading.parts, codec.level_tables(arrays), strict=True):
        codes = np.asarray(stored[part.field])
        levels = kernel_oracle.level_of(part.levels, np.asarray(table), codes)
        levels = levels if part.levels == "table" else levels * float(table[0])
        if part.scale:
            levels = levels * row(codec, arrays, stored, part.scale)
        pieces.append(levels + (row(codec, arrays, stored, part.offset) if part.offset else 0.0))
    return np.concatenate(pieces, axis=-1)


def row(codec, arrays, stored, name):
    values = codec.row_values(arrays, name, stored[name][..., 0])
    return np.asarray(values, np.float64)[:, None]


def of_head(tree, h):
    return jax.tree.map(lambda x: jnp.asarray(x[h]), tree)


@pytest.mark.parametrize("name", READ)
def test_reading_says_what_the_codec_reads(name):
    c = cell(name, 64)
    codec = c["codec"]
    assert codec.reading.width == sum(p.width for p in codec.reading.parts)
    for h in range(HEADS):
        arrays, stored = (of_head(c[k], h) for k in ("arrays", "stored"))
        values = stored_values(codec, arrays, stored)
        q, offset = jax.jit(codec.reading_query)(arrays, c["q"][h])
        assert q.shape[-1] == codec.reading.width
        logits = np.asarray(q, np.float64) @ values.T
        logits += 0.0 if offset is None else np.asarray(offset, np.float64)[:, None]
        q_size, k_size = (np.linalg.norm(c[k][h], axis=-1) for k in ("q", "decoded"))
        size = q_size[:, None] * k_size
        assert np.max(np.abs(c["logits"][h] - logits) / size) < TOL["product_f32"]
        acc = (c["weights"][h].astype(np.float64) @ values).astype(np.float32)
        mass = c["weights"][h].sum(-1)
        out = np.asarray(jax.jit(codec.unfold_output)(arrays, acc, mass))
        scale = np.abs(c["decoded"][h]).max()
        assert np.max(np.abs(out - c["output"][h])) / scale < TOL["product_f32"]


@pytest.mark.parametrize("name", READ)
def test_symmetric_tables_are_symmetric_to_the_last_bit(name):
    c = cell(name, 64)
    for h in range(HEADS):
        tables = c["codec"].level_tables(of_head(c["arrays"], h))
        for part, table in zip(c["codec"].reading.parts, tables, strict=True):
            if part.symmetric:
                np.testing.assert_array_equal(np.asarray(table), -np.asarray(table)[::-1])


def test_data_free_codebooks_are_said_to_be_symmetric():
    assert TurboQuantMSE(dim=64, bits=3).reading.parts[0].symmetric
    assert not PerHead(dim=64, bits=3).reading.parts[0].symmetric
    with pytest.raises(ValueError, match="said of tables"):
        Part(field="a", width=8, bits=4, levels="affine", symmetric=True)


def test_most_codecs_of_the_main_road_have_a_reading():
    names = {ROWS[name].make(64).name for name in READ}
    assert names >= {
        "turboquant_mse", "turboquant_prod", "per_head", "turboquant_outliers", "int8_token_head",
        "fp8", "vllm_turboquant_value",
    }  # fmt: skip
    assert IntAffine(dim=64, bits=3).reading is not None


def test_part_offsets_and_bits():
    parts = (
        Part(field="a", width=32, bits=4, levels="table"),
        Part(field="b", width=64, bits=2, levels="affine", scale="s", offset="o"),
    )
    reading = Reading(parts=parts)
    assert (reading.width, reading.starts, reading.bits_per_token) == (96, (0, 32), 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": "lut"}, "levels"),
        ({"levels": "sign", "bits": 2}, "bits"),
        ({"levels": "e4m3", "bits": 4}, "bits"),
        ({"bits": 9}, "bits"),
        ({"width": 0}, "width"),
    ],
)
def test_refuses_impossible_parts(change, message):
    with pytest.raises(ValueError, match=message):
        Part(**{"field": "a", "width": 8, "bits": 3, "levels": "table"} | change)


def test_refuses_an_empty_reading_and_codecs_without_one():
    with pytest.raises(ValueError, match="at least one part"):
        Reading(parts=())
    codec = IntAffine(dim=64, bits=3, group=32)
    assert codec.reading is None
    with pytest.raises(TurboqError, match="int_affine"):
        codec.level_tables({})


def test_static_scales_are_gains_or_in_the_table():
    assert FP8(dim=64, scale="head").level_tables({"scale": jnp.float32(3.0)})[0] == 3.0
    assert TurboQuantMSE(dim=64, bits=2).level_tables({})[0].shape == (4,)
