"""A plan that the allocator finds under an engine's constraints exports with every entry exact."""

import dataclasses

import numpy as np
import pytest
from plan_cases import geometry
from unchecked import unchecked

from turboq.cache.layer import TokenPolicy
from turboq.codecs import FP8, Exact, PerChannel, TurboQuantMSE
from turboq.export import ENGINES, Options
from turboq.export.base import entries
from turboq.export.report import make_report
from turboq.plan.build import at_dim
from turboq.plan.violations import violations
from turboq_calibrate.candidates.table import Option, Table
from turboq_calibrate.choose.solver.problem import Infeasible, Problem
from turboq_calibrate.choose.solver.solve import allocate

BUUN = "buun-llama.cpp"
FOREIGN = {
    "foreign 3": (TurboQuantMSE(dim=64, bits=3),) * 2,
    "foreign 8": (PerChannel(dim=64, bits=8, form="affine"),) * 2,
    "foreign f32": (Exact(dim=64, dtype="float32"),) * 2,
}
MODELS = {
    "dense": geometry(layers=6, kv_heads=2, k_dim=64, v_dim=64),
    "dense 80": geometry(layers=5, kv_heads=1, k_dim=80, v_dim=80),
    "unequal": geometry(layers=2, kv_heads=2, k_dim=128, v_dim=64),
}


def windowed():
    model = MODELS["dense"]
    layers = [dataclasses.replace(la, window=512 if la.index % 2 else None) for la in model.layers]
    return dataclasses.replace(model, layers=tuple(layers))


def hybrid():
    """Layers without a cache between, as models with recurrent layers have."""
    model = MODELS["dense"]
    off = {"kv_heads": 0, "q_heads": 0, "k_dim": 0, "v_dim": 0, "rope_layout": "none"}
    layers = [la if la.index % 2 else dataclasses.replace(la, **off) for la in model.layers]
    return dataclasses.replace(model, layers=tuple(layers))


MODELS |= {"windowed": windowed(), "hybrid": hybrid()}


def arrays_of(codec, rng, shared):
    """Arrays of one head; a scale per tensor is the same for all heads."""
    out = {name: rng.uniform(0.5, 2, shape) for name, shape in codec.array_shapes.items()}
    if isinstance(codec, FP8) and codec.scale == "tensor":
        out["scale"] = np.asarray(shared)
    return {name: values.astype(np.float32) for name, values in out.items()}


def table(model, formats, rng) -> Table:
    """Every format of the engine, and some that it has not, for every unit."""
    pairs = {n: p for n, p in (formats | FOREIGN).items() if p[0].block == 1}
    options = {}
    for layer in model.cache_layers:
        for side, dim, at in (("k", layer.k_dim, 0), ("v", layer.v_dim, 1)):
            found = []
            for pair in pairs.values():
                codec, shared = at_dim(pair[at], dim), rng.uniform(0.5, 2)
                heads = [arrays_of(codec, rng, shared) for _ in range(layer.kv_heads)]
                found.append(Option((codec,) * layer.kv_heads, lambda heads=heads: heads))
            options[layer.index, side] = tuple(found)
    return Table(tuple(pairs), options)


@pytest.fixture(autouse=True)
def plain_python():
    with unchecked():
        yield


# buun's tiers have codecs of their own, for which ours only stand in: nothing there is exact.
@pytest.mark.parametrize("name", [n for n in ENGINES if n not in ("reader", "qwix", BUUN)])
@pytest.mark.parametrize("model", MODELS)
def test_allocated_plans_are_exact(name, model):
    engine, geometry = ENGINES[name], MODELS[model]
    if name == "kvtuner" and model == "dense 80":
        pytest.skip("no group divides 80")
    if name in ("transformers", "mlx-lm") and model == "hybrid":
        pytest.skip("refuses models with layers that have no cache")
    rng = np.random.default_rng(len(name) + len(model))
    options = Options(dtype="bfloat16")
    candidates = table(geometry, engine.formats(geometry, options), rng)
    problem = Problem.of(candidates, rng.uniform(1, 2, candidates.sizes.shape))
    rules = engine.constraints(geometry, options)
    used = set()
    for limit in (candidates.sizes.max(1).sum(), problem.channels * 17 // 2):
        try:
            answer = allocate(problem, int(limit), rules)
        except Infeasible:  # an engine may have nothing so small
            continue
        plan, arrays = candidates.to_plan(
            geometry, answer.chosen, policy=engine.policy(TokenPolicy())
        )
        assert any(not violations(rule, plan) for rule in rules)
        report = make_report(plan, arrays, engine, engine.project(plan, arrays, options), [])
        wrong = [entry for entry in report.entries() if entry[2].status != "exact"]
        assert not wrong, wrong[:2]
        assert report.status == "exact"
        assert report.engine_bytes_per_token >= report.plan_bytes_per_token
        used |= {e.codec.name for e in entries(plan, arrays)}
    assert used


def test_without_its_constraints_a_plan_would_not_be_exact():
    engine, model = ENGINES["llama.cpp"], MODELS["dense"]
    rng = np.random.default_rng(0)
    candidates = table(model, engine.formats(model, Options()), rng)
    problem = Problem.of(candidates, rng.uniform(1, 2, candidates.sizes.shape))
    answer = allocate(problem, int(candidates.sizes.max(1).sum()))
    plan, arrays = candidates.to_plan(model, answer.chosen)
    report = make_report(plan, arrays, engine, engine.project(plan, arrays, Options()), [])
    assert report.counts["exact"] < sum(report.counts.values())
