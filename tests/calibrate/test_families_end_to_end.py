"""Calibrate, plan and evaluate on a tiny model of every mechanism that Llama does not have."""

from pathlib import Path

import numpy as np
import pytest
from stat_cases import random_windows
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import PerHead, TurboQuantMSE
from turboq_calibrate.candidates.makers import named
from turboq_calibrate.candidates.table import build_table
from turboq_calibrate.cost.side_by_side import Engine
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import forward, load_model, run_head
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    # soft caps, norms on both sides, windows (of 5 tokens) that pages and recent tokens cross
    "gemma2": [5, None, 5],
    # experts, read as they are due, with a shared one; a dense layer
    "qwen2_moe": [5, None, None],
    # layers without a rotary embedding among others; keys stored before it where there is one
    "smollm3": [None] * 5,
    # partial rotation of neighbouring channels
    "glm": [None] * 2,
    # logit sinks, experts with biases, YaRN
    "gpt_oss": [5, None, 5],
    # gated delta-nets without keys and values beside gated attention
    "qwen3_next": [None] * 3,
    # one latent vector of all heads, experts in groups
    "deepseek_v3": [None] * 3,
    # attention and MLP side by side
    "cohere2": [5, 5, 5, None, 5],
    # caches that two layers read, heads by layer, inputs of layers
    "gemma4": [5, None, 5, 5, None],
}


@pytest.mark.parametrize("name", MODELS)
def test_calibrate_plan_evaluate(name, tmp_path):
    """Eight bits lose next to nothing, two bits lose much: attention to quantized tokens caps,
    scales and slides as exact attention does. What prices single changes runs the same layers."""
    model = load_model(GOLDEN / name, resident=False)
    windows = random_windows(model.spec.vocab, count=24, length=24)
    recipe = ObserveRecipe(skip=2, windows_per_chunk=24)
    found = observe(model, windows, tmp_path, recipe, progress=False, log=lambda line: None)
    geometry = model_geometry(model)
    assert [layer.window for layer in geometry.layers] == MODELS[name]
    rotations = {layer.rope_layout for layer in geometry.cache_layers}
    before = rotations & {"none", "interleaved"}
    plans = []
    for bits in (2, 8):
        codec = PerHead(dim=geometry.cache_layers[0].k_dim, bits=bits)
        policy = TokenPolicy(sinks=1, recent=2, exact_dtype="float32")
        plan, arrays = make_plan(geometry, k=codec, v=codec, policy=policy, statistics=found,
                                 k_rope="before" if before else "after")  # fmt: skip
        plans.append((f"{bits} bits", plan, arrays))
    tokens = np.asarray(windows.tokens[:2])
    rows = evaluate(model, plans, tokens, text="random", progress=False).rows
    assert rows[0]["kl_mean"] > 10 * TOL["kl_packed"]
    # The median: the least error may turn a token to other experts, which few tokens are.
    assert 0 <= rows[1]["kl_median"] < rows[0]["kl_median"] / 100
    makers = [named("tq", TurboQuantMSE(dim=geometry.cache_layers[0].k_dim, bits=2))]
    table = build_table(geometry, makers, found_of(found))
    policy = TokenPolicy(sinks=1, recent=2, exact_dtype="float32")
    engine = Engine(model, table, tokens, policy)
    alone = run_head(model.spec, model.head_params(), engine.exact.hidden[-1])
    np.testing.assert_allclose(alone, forward(model, tokens)[0], rtol=0, atol=TOL["model_golden"])


def found_of(statistics):
    return lambda layer, side: statistics.layers[layer].observed(side)
