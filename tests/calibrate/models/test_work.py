"""Shares of work against the products that XLA counts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from turboq_calibrate.models import default_positions, exact_attend, load_model
from turboq_calibrate.models.decoder import head, layer
from turboq_calibrate.models.work import shares

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENS = 24


@pytest.mark.parametrize("name", ["llama3", "glm4", "qwen3"])
def test_shares_are_those_of_the_products(name):
    """Within a fifth: XLA counts norms, rotations and masks too, of much of so small layers."""
    model = load_model(GOLDEN / name)
    spec = model.spec
    x = jax.ShapeDtypeStruct((1, TOKENS, spec.kept), jnp.float32)
    positions = default_positions(jnp.zeros((1, TOKENS), jnp.int32))

    def flops(run, *arguments) -> float:
        return jax.jit(run).lower(*arguments).cost_analysis()["flops"]

    counted = [
        flops(lambda x, p, s=s: layer(s, p, x, positions, exact_attend, None)[0], x, model.layer(i))
        for i, s in enumerate(spec.layers)
    ]
    counted.append(flops(lambda x, p: head(spec, p, x), x, model.head_params()))
    found = shares(spec, TOKENS)
    assert sum(found) == pytest.approx(1)
    for share, due in zip(found, counted, strict=True):
        assert share == pytest.approx(due / sum(counted), rel=0.2)
