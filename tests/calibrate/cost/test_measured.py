"""KL of single changes against the evaluation of whole plans; resuming; refusals."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import joint
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulated_attention
from turboq.codecs import Exact, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.plan import Plan, uniform_plan
from turboq_calibrate.candidates import table as c
from turboq_calibrate.candidates.makers import learned, named
from turboq_calibrate.cost import measured as s
from turboq_calibrate.cost.side_by_side import EXACT, Engine
from turboq_calibrate.measure.attention_plugs import simulated_attend
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.measure.teacher_forced import hidden_states
from turboq_calibrate.models import exact_attend, forward, load_model, run_head
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2, recent=3, exact_dtype="float32")
NOTHING = 2  # the label that stores float32


def random_vectors(layout):
    """What was seen of every side: vectors of the model's shapes, not of its scale."""
    rng = np.random.default_rng(7)

    def observed(layer, side):
        own = layout.layers[layer]
        shape = (own.kv_heads, 256, own.k_dim if side == "k" else own.v_dim)
        return Observed.of(rng.normal(size=shape).astype(np.float32))

    return observed


def make_table(model, **stored):
    dim, layout = model.spec.layers[0].head_dim, model_geometry(model)
    makers = [
        named("tq 2", TurboQuantMSE(dim=dim, bits=2)),
        *learned({"transform 3": 3}),
        named("exact", Exact(dim=dim, dtype="float32")),
    ]
    return c.build_table(layout, makers, random_vectors(layout), **stored)


def make_windows(model, length=25):
    rng = np.random.default_rng(11)
    return rng.integers(0, model.spec.vocab, (2, length)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


@pytest.fixture(scope="module")
def engine(model):
    windows = make_windows(model)
    return Engine(model, make_table(model), windows, POLICY)


def evaluated(engine, choices):
    """Mean KL of whole plans, by the quality table's own code: [plans]."""
    geometry = model_geometry(engine.model)
    plans = [
        (str(i), *engine.table.to_plan(geometry, choice, policy=engine.policy))
        for i, choice in enumerate(choices)
    ]
    rows = evaluate(engine.model, plans, engine.tokens, text="noise", progress=False).rows
    return np.array([row["kl_mean"] for row in rows])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=TOL["kl_model_rel"], atol=TOL["kl_model_abs"])


def test_one_unit_alone_is_the_plan_that_changes_only_it(engine):
    table = engine.table
    moves = s.unit_moves(table, [0, 1])
    assert len(moves) == 2 * len(table.units)
    found = s.measure(engine, moves, rows=5, progress=False)
    some = moves[:: len(moves) - 1]
    choices = []
    for move in some:
        ((unit, candidate),) = move.changes
        choices.append(np.full(len(table.units), NOTHING))
        choices[-1][unit] = candidate
    costs = s.isolated_costs(table, found)
    got = np.array([costs[move.changes[0]] for move in some])
    close(got, evaluated(engine, choices))
    assert np.all(got > 100 * TOL["kl_model_abs"])  # so that the comparison means something
    assert np.isnan(costs[:, NOTHING]).all()
    assert not found.base.any()


def test_whole_plans_and_changes_of_them(engine, rng):
    """Redrawn, a change of a plan is the evaluation of the changed plan."""
    table = engine.table
    plan = rng.integers(0, 2, len(table.units))
    rows = table.rows(1, "k")
    move = s.Move(layer=1, changes=tuple((u, NOTHING) for u in range(rows.start, rows.stop)))
    changed = plan.copy()
    changed[rows] = NOTHING
    found = s.measure(engine, [move], base=plan, frozen=False, progress=False)
    got = [found.base.mean(), found.kl[0].mean(), engine.kl(plan[None])[0].mean()]
    want = evaluated(engine, [plan, changed])
    close(got, [want[0], want[1], want[0]])
    assert found.change[0] == pytest.approx(got[1] - got[0], rel=1e-9)


def joined(model, heads):
    """Random turns of `heads` neighbours in every layer."""
    out, random = {}, np.random.default_rng(5)
    for layer in model_geometry(model).cache_layers:
        shapes = joint.shapes(layer.kv_heads, heads, layer.k_dim, layer.v_dim)
        dim = shapes["mean"][1]
        out[layer.index] = {
            "mean": random.normal(size=shapes["mean"]),
            "synthesis": 0.05 * random.normal(size=shapes["synthesis"]) + np.eye(dim),
        }
    return {"joint_heads": heads, "joint": out}


@pytest.mark.parametrize("heads", [None, 1, 2])
def test_keys_before_rope_alone_and_with_values(model, rng, heads, monkeypatch):
    """Side by side they stand as layers store them before what joins them is rounded to int8; what
    is not quantized is exact."""
    stored = {"k_rope": "before"} | ({} if heads is None else joined(model, heads))
    engine = Engine(model, make_table(model, **stored), make_windows(model), POLICY)
    table = engine.table
    plan = rng.integers(0, 2, len(table.units))
    if heads is not None:
        alone = dataclasses.replace(table, joint_heads=None, joint={})
        apart, arrays = alone.to_plan(model_geometry(model), plan, policy=engine.policy)
        whole = [
            dataclasses.replace(layer, joint_heads=heads, joint=joint.arrays_of(table.joint[i]))
            for i, layer in enumerate(apart.kv_layers(arrays))
        ]
        monkeypatch.setattr(Plan, "kv_layer", lambda _, i, __: whole[i])
    close(engine.kl(plan[None])[0].mean(), evaluated(engine, [plan])[0])
    run = engine.run(plan)
    frozen = engine.kl(plan[None], start=1, run=run, frozen=True)[0]
    np.testing.assert_allclose(frozen, engine.kl(plan[None])[0], rtol=1e-3)
    assert not engine.kl(np.full((1, len(table.units)), EXACT)).any()


def test_keys_of_blocks_are_refused(model):
    table = make_table(model, k_rope="block:16")
    with pytest.raises(TurboqError, match="before or after RoPE, not block:16"):
        Engine(model, table, make_windows(model), POLICY)


def test_frozen_noise(engine, rng):
    """No change costs nothing; in the last layer there is nothing to redraw; before, there is."""
    table = engine.table
    plan = rng.integers(0, 2, len(table.units))
    last = max(table.layers)

    def first_unit(layer, candidate):
        unit = table.rows(layer, "k").start
        return s.Move(layer=layer, changes=((unit, candidate),))

    stay = [first_unit(i, int(plan[table.rows(i, "k").start])) for i in table.layers]
    moves = [*stay, first_unit(0, NOTHING), first_unit(last, NOTHING)]
    frozen, redrawn = (
        s.measure(engine, moves, base=plan, frozen=f, progress=False) for f in (True, False)
    )
    np.testing.assert_allclose(frozen.kl[: len(stay)].mean(axis=1), frozen.base.mean(), rtol=1e-4)
    np.testing.assert_allclose(frozen.kl[-1], redrawn.kl[-1], rtol=TOL["kl_model_rel"])
    assert not np.allclose(frozen.kl[-2], redrawn.kl[-2], rtol=1e-3)


def test_more_bits_cost_less(model):
    windows = make_windows(model)
    dim = model.spec.layers[0].head_dim
    makers = [named(str(b), TurboQuantMSE(dim=dim, bits=b)) for b in (1, 4)]
    table = c.build_table(model_geometry(model), makers)
    engine = Engine(model, table, windows, TokenPolicy())
    costs = s.isolated_costs(table, s.measure(engine, s.unit_moves(table), progress=False))
    assert np.all(costs[:, :-1] > 2 * costs[:, 1:])
    assert np.all(costs > 0)


def test_interrupted_measurement_continues(engine, tmp_path, monkeypatch):
    """The same bytes as an uninterrupted one, and nothing is measured twice."""
    moves = s.unit_moves(engine.table, [0, 1])
    options = {"rows": 3, "progress": False}
    whole = s.measure(engine, moves, path=tmp_path / "whole.jsonl", **options)
    path, calls = tmp_path / "kl.jsonl", []
    kl = Engine.kl

    def fails_at_the_third(self, choices, **how):
        calls.append(len(choices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kl(self, choices, **how)

    monkeypatch.setattr(Engine, "kl", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        s.measure(engine, moves, path=path, **options)
    with path.open("ab") as f:
        f.write(b'{"kl": [[0.1')  # killed within a write
    again = s.measure(engine, moves, path=path, **options)
    np.testing.assert_array_equal(again.kl, whole.kl)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(calls) == len(moves) + calls[2]  # only the pass that failed ran twice
    count = len(calls)
    s.measure(engine, moves, path=path, **options)
    assert len(calls) == count


def test_file_of_another_measurement_is_refused(engine, tmp_path):
    moves, path = s.unit_moves(engine.table, [0])[:2], tmp_path / "kl.jsonl"
    s.measure(engine, moves, path=path, progress=False)
    base = np.zeros(len(engine.table.units), int)
    for other in ({"base": base}, {"rows": 3}):
        with pytest.raises(TurboqError, match=f"another measurement.*{next(iter(other))}"):
            s.measure(engine, moves, path=path, progress=False, **other)
    with pytest.raises(TurboqError, match=r"another measurement.*moves"):
        s.measure(engine, moves[:1], path=path, progress=False)
    path.write_bytes(path.read_bytes() + b"{}\nnonsense\n")
    with pytest.raises(TurboqError, match="damaged"):
        s.measure(engine, moves, path=path, progress=False)
    first = path.read_bytes().splitlines()[0]
    for wrong in (b"[]", b"7", b"{}", b'{"kl": 3}'):
        path.write_bytes(first + b"\n" + wrong + b"\n")
        with pytest.raises(TurboqError, match="damaged"):
            s.measure(engine, moves, path=path, progress=False)
    path.write_bytes(b"")
    with pytest.raises(TurboqError, match="empty"):
        s.measure(engine, moves, path=path, progress=False)


def test_refusals(engine, model):
    with pytest.raises(ValueError, match="units of layer 1 only"):
        s.measure(engine, [s.Move(layer=1, changes=((0, 1),))], progress=False)
    with pytest.raises(ValueError, match="rows=0"):
        s.measure(engine, [], rows=0, progress=False)
    part = {key: value for key, value in engine.table.options.items() if key[0] == 0}
    with pytest.raises(TurboqError, match=r"candidates are for layers \(0,\)"):
        Engine(model, c.Table(engine.table.labels, part), engine.tokens, POLICY)
    with pytest.raises(TurboqError, match="two tokens more"):
        Engine(model, engine.table, engine.tokens[:, :1], POLICY)


def test_passes_of_a_layer_are_nearly_equal(engine):
    moves = s.unit_moves(engine.table, [0, 1])
    batches = s._batches(engine, moves, 5)
    assert sorted(i for b in batches for i in b) == list(range(len(moves)))
    assert all(len({moves[i].layer for i in b}) == 1 for b in batches)
    assert {len(b) for b in batches} == {4}


def test_a_shared_cache_costs_what_all_of_its_readers_lose():
    """Side by side and evaluated: the KL of a pass in which borrowers read the owner's codec."""
    model = load_model(GOLDEN / "gemma4")
    layout = model_geometry(model)
    codec = TurboQuantMSE(dim=8, bits=2)
    table = c.build_table(layout, [named("tq 2", codec)], random_vectors(layout))
    engine = Engine(model, table, make_windows(model, length=16), POLICY)
    choice = np.where([unit.layer == 2 for unit in table.units], 0, EXACT)  # a lender alone
    plan = uniform_plan(layout, k=codec, v=codec, policy=POLICY)
    lent = plan.kv_layers({})[2]

    def plug(spec, q, k, v, positions, layer):
        if layer is None:
            return exact_attend(spec, q, k, v, positions, None)
        out = simulated_attention(
            layer, q, k, v, scale=spec.scale, window=spec.window, softcap=spec.softcap
        )
        return out, None

    def log_p(read):
        return np.asarray(jax.nn.log_softmax(forward(model, engine.tokens, plug, read)[0]), float)

    exact, alone, both = (
        log_p([lent if i in readers else None for i in range(5)]) for readers in ((), (2,), (2, 3))
    )
    first = POLICY.sinks + POLICY.recent
    kl = [np.sum(np.exp(exact) * (exact - x), -1)[:, first:-1].mean(1) for x in (alone, both)]
    close(engine.kl(choice[None])[0], kl[1])
    assert (np.abs(kl[0] / kl[1] - 1) > 0.05).all()  # the borrower's part is felt
    owned = [None, None, lent, None, None]
    hidden, _ = hidden_states(
        model, {"": owned}, engine.tokens, simulated_attend, lambda layer: None
    )
    logits = run_head(model.spec, model.head_params(), hidden[""])
    got = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(got, both, rtol=0, atol=TOL["decode_exact"])
