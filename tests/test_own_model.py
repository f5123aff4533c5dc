"""The example of one's own flax model: the seam against plain attention, and what it claims."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import TokenPolicy

EXAMPLE = Path(__file__).resolve().parents[1] / "experiments" / "own_model.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_it_runs_as_it_says(example, tmp_path):
    found = example["run"](tmp_path, 4, TokenPolicy(sinks=4))
    assert 1e-3 < found["KL to plain attention, nats per token"] < 0.3
    assert found["continued from the checkpoint alike"]
    # Two heads of 16 * 3 + 16 * 2 + 4 and 16 * 4 + 8 * 2 + 4 bits, K and V, in four layers.
    assert found["bytes per token"] == 4 * 2 * (84 + 84) / 8
    # All that is donated is written in place: the cache, and the codecs that travel with it.
    assert found["bytes that a step writes in place"] >= found["bytes of the caches"]
    assert len({tuple(row) for row in found["tokens"]}) == 2


def test_a_cache_of_exact_tokens_is_plain_attention(example, rng):
    """Both plugs of the seam, in pieces and at once; keys and values of random numbers."""
    layer, dim, heads = 2, example["DIM"], example["KV_HEADS"]
    codec = example["Transform"](dim=dim, segments=((8, 1),))
    x = rng.normal(size=(heads, 64, dim)).astype(np.float32)
    policy = TokenPolicy(sinks=32, exact_dtype="float32")
    plan = example["head_plan"](
        example["geometry"](), lambda *place: codec, k_rope="before", policy=policy
    )
    fitted = codec.fit(example["Observed"].of(x))
    arrays = example["collect_arrays"](plan, lambda *place: fitted)
    states, words = example["stacked"](plan, arrays, 32)
    state = jax.tree.map(lambda leaf: leaf[layer], states)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 9, n, dim)), jnp.float32)
        for n in (example["HEADS"], heads, heads)
    )
    positions = example["at"](0, jnp.zeros((2, 9), jnp.int32))
    due, ((before, values), _) = example["plain"](q, k, v, positions, (None, None))
    parts, seam = [], (state, words)
    for start, end in ((0, 8), (8, 9)):
        piece = (y[:, start:end] for y in (q, k, v, positions))
        out, seam = example["packed"](*piece, seam)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), due, atol=TOL["attention_f32"])
    turned = example["rotate"](example["ROPE"], before, positions[:, :, None])
    np.testing.assert_allclose(turned, k, atol=TOL["rope_rotate"])
    np.testing.assert_array_equal(values, v)
