"""Scores through the packed cache against whole float64 passes; statistics against closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulated_attention
from turboq.codecs import Exact, KiviKey, KiviValue, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import uniform_plan
from turboq_calibrate.measure.storage_columns import exact_tokens
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.tasks import results, run
from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.examples import Example
from turboq_calibrate.tasks.score import Score, score
from turboq_calibrate.tasks.statistics import above_chance, mcnemar, needed, summary

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2)
ROOM, PROMPT = 8, 33


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


def plan_of(model, k, v=None):
    return uniform_plan(model_geometry(model), k=k, v=v or k, policy=POLICY)


@pytest.fixture(scope="module")
def example(model):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, model.spec.vocab, 100).astype(np.int32)
    answers = (tuple(ids[:5].tolist()), tuple(ids[5:13].tolist()), (int(ids[13]),))
    return Example(
        task="noise", index=0, length=PROMPT + ROOM, depth=None, prompt=ids[20 : 20 + PROMPT],
        answers=answers,
    )  # fmt: skip


def simulated(spec, q, k, v, positions, layer):
    return simulated_attention(layer, q, k, v, scale=spec.scale), layer


def by_hand(model, layers, prompt, answer):
    """log p and rank of every token of an answer, from one pass over prompt and answer."""
    tokens = np.zeros(PROMPT + ROOM, np.int32)  # what follows the answer is seen by nothing
    tokens[:PROMPT], tokens[PROMPT : PROMPT + len(answer)] = prompt, answer
    logits = np.asarray(forward(model, tokens[None], simulated, layers)[0][0], np.float64)
    logits = logits[PROMPT - 1 :][: len(answer)]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = np.arange(len(answer)), np.asarray(answer)
    return logp[at], 1 + (logits > logits[at][:, None]).sum(axis=-1), logits.argmax(axis=-1)


def test_scores_against_whole_passes(model, example):
    """Exact and quantized caches, one of whose codecs stores blocks of tokens."""
    plans = [
        plan_of(model, Exact(dim=16, dtype="float32")),
        plan_of(model, TurboQuantMSE(dim=16, bits=2)),
        plan_of(model, KiviKey(dim=16, bits=2, group=32), KiviValue(dim=16, bits=2, group=16)),
    ]
    exact = None
    for plan in plans:
        layers = plan.kv_layers({})
        found = score(model, layers, example, exact and exact.greedy)
        hand = [by_hand(model, layers, example.prompt, answer) for answer in example.answers]
        want = [logp.sum() for logp, _, _ in hand]
        np.testing.assert_allclose(found.logp, want, rtol=0, atol=8 * TOL["decode_packed"])
        assert found.rank == hand[0][1].max() > 1
        if exact is None:
            exact, written = found, []
            for _ in example.answers[0]:
                written.append(int(by_hand(model, layers, example.prompt, [*written, 0])[2][-1]))
            assert found.greedy == tuple(written)
        of_greedy = by_hand(model, layers, example.prompt, exact.greedy)
        assert found.agrees == (of_greedy[2] == exact.greedy).all()
        assert not found.matches
    right = Example(**{**vars(example), "answers": (exact.greedy, *example.answers[1:])})
    found = score(model, plans[0].kv_layers({}), right)
    assert (found.rank, found.matches, found.agrees, found.greedy) == (1, True, True, exact.greedy)


def test_mcnemar_and_chance_against_closed_forms():
    before, after = [True] * 9 + [False] * 4, [True] * 2 + [False] * 7 + [True] + [False] * 3
    n, lost = 8, 7  # pairs that differ: 7 lost, 1 won
    tail = sum(math.comb(n, i) for i in range(lost, n + 1)) / 2**n
    assert mcnemar(before, after) == pytest.approx(2 * tail, rel=TOL["f64"])
    assert mcnemar(after, before) == mcnemar(before, after)
    assert mcnemar(before, before) == 1
    for right in range(11):
        p = sum(math.comb(10, i) * 0.25**i * 0.75 ** (10 - i) for i in range(right, 11))
        assert above_chance([True] * right + [False] * (10 - right), 4) == (p < 0.05)


@pytest.mark.parametrize(("answers", "fewest"), [(2, 5), (4, 3), (20, 2), (21, 1)])
def test_with_too_few_examples_nothing_is_above_chance(answers, fewest):
    assert needed(answers) == fewest
    assert above_chance([True] * fewest, answers)
    assert not any(above_chance([True] * n, answers) for n in range(1, fewest))


def scores(*logps, rank=1, greedy=(1,)):
    return [Score(logp=x, rank=rank, agrees=True, greedy=greedy) for x in logps]


def test_too_few_examples_are_called_so():
    """All right, of four answers: two examples may be luck, three count."""
    storage = {"plan": "p", "exact_tokens": [4, 0], "task": "t", "length": 48, "by_depth": []}
    for count, said in ((1, "too few"), (2, "too few"), (3, "")):
        right = scores(*[(-1.0, -2.0, -2.0, -2.0)] * count)
        row = storage | summary(right, right)
        assert row["at_chance"] == bool(said)
        (cell,) = results.cells([row])
        assert cell["exact"] == "100 %" + " (too few examples)" * bool(said)
        notes = results.notes_of({"model": "m", "rows": [row]})[1:]
        assert notes == [
            "too few examples to tell from chance, so counted for nothing: t (3 needed)"
        ] * bool(said)


def test_details_say_intervals_ranks_matches_and_depths():
    exact = scores(*[(-1.0, -9.0)] * 6)
    plan = scores(*[(-1.5, -9.0)] * 4, rank=5) + scores(*[(-1.5, -9.0)] * 2, rank=1)
    depths = [{"depth": 0.25, "logp_change": -0.25, "agrees": 1.0}]
    storage = {"plan": "p", "exact_tokens": [4, 0], "task": "t", "length": 48, "by_depth": depths}
    row = storage | summary(plan, exact)
    assert row["logp_examples"] == [-1.5] * 6
    assert results.details([row]) == [
        {
            "task": "t",
            "length": "48",
            "plan": "p",
            "change (95 %)": "-0.50 (-0.50 .. -0.50)",
            "median rank / exact": "5 / 1",
            "written / exact": "33 % / 100 %",
            "McNemar p": f"{2 * 0.5**4:.2g}",
            "at 0.25": "-0.25",
        }
    ]
    old = {name: x for name, x in row.items() if not name.startswith("rank_median")}
    assert results.details([old])[0]["median rank / exact"] == "-"


def test_sizes_count_everything_at_every_length(model):
    """By hand: pages of 256 tokens, float16 norms, two sinks in bfloat16; no arrays, one table."""
    layers = plan_of(model, TurboQuantMSE(dim=16, bits=2)).kv_layers({})
    rows = [run._storage("p", layers, n) | {"task": "t", "length": n} for n in (256, 64)]
    vectors = 2 * 2 * 2  # K and V of two heads in two layers
    stored = 256 * vectors * (16 * 2 + 16) // 8 + 2 * vectors * 16 * 2
    table = accounting.table_bytes(layers)
    assert [row["cache_bytes"] for row in rows] == [stored + table] * 2
    bits = [8 * (stored + table) / (n * vectors * 16) for n in (64, 256)]
    assert [row["bits_per_channel_at_length"] for row in rows] == bits[::-1]
    assert results.sizes(rows) == [
        {
            "plan": "p", "bits/ch": "3.00",
            "all at 64": f"{bits[0]:.2f}", "bytes at 64": accounting.readable(stored + table),
            "all at 256": f"{bits[1]:.2f}", "bytes at 256": accounting.readable(stored + table),
        }
    ]  # fmt: skip
    for row in rows:  # of an older version
        del row["bits_per_channel_at_length"]
    assert results.sizes(rows)[0]["all at 64"] == "-"


def test_a_summary_is_paired():
    rng = np.random.default_rng(0)
    base = (-10 * rng.random(12)).tolist()
    exact = [Score(logp=(x, -50.0), rank=1, agrees=True, greedy=(1,)) for x in base]
    plan = [
        Score(logp=(x - 0.5, x), rank=4, agrees=i % 3 > 0, greedy=(1,)) for i, x in enumerate(base)
    ]
    row = summary(plan, exact)
    assert row["logp_change"] == pytest.approx(-0.5)
    np.testing.assert_allclose(row["logp_change_ci"], [-0.5, -0.5])  # unpaired: nats wide
    assert (row["rank"], row["agrees"]) == (pytest.approx(4), pytest.approx(2 / 3))
    assert (row["chosen"], row["chosen_exact"], row["at_chance"]) == (0, 1, False)
    assert row["chosen_p"] == pytest.approx(2 / 2**12)


def flag(rng, size, depth):
    """Answers of one letter, which a random model chooses by lot."""
    right, *wrong = rng.sample("abcdefgh", 4)
    return Sample(prompt="." * size + right, answer=right, wrong=tuple(wrong))


TASK = Task(name="flag", write=flag)


def test_run_keeps_scores_and_counts_no_task_at_chance(model, tmp_path, monkeypatch):
    plans = [("2", plan_of(model, TurboQuantMSE(dim=16, bits=2)), {})]
    calls = []

    def counted(model, layers, example, greedy):
        calls.append(example.index)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return score(model, layers, example, greedy)

    monkeypatch.setattr(run, "score", counted)

    def table(which=plans, **options):
        return run.measure_tasks(
            model, which, [TASK], lengths=[48], count=4, depths=[0.0, 1.0], room=ROOM,
            progress=False, folder=tmp_path / "kept", **options,
        )  # fmt: skip

    lots = table()
    assert calls == [0, 1, 2, 3]  # no plan is measured where nothing can be lost
    assert [(row["plan"], row["task"], row["at_chance"]) for row in lots["rows"]] == [
        ("exact", "flag", True)
    ]
    lines = results.format_results(lots).splitlines()
    assert lines[4] == "at chance with the exact cache, so counted for nothing: flag"
    assert lines[5] == results.SIZES
    assert lines[3].split()[:2] == ["flag", "48"]
    monkeypatch.setattr("turboq_calibrate.tasks.statistics.LEVEL", 2.0)  # everything is above
    with pytest.raises(KeyboardInterrupt):
        table()
    found = table()
    assert calls == [0, 1, 2, 3, 0, 1, 2, 2, 3]
    assert table() == found
    assert len(calls) == 9
    table([("other name", *plans[0][1:])])  # scores do not know names
    assert len(calls) == 9
    assert [(row["plan"], row["task"]) for row in found["rows"]] == [("2", "flag"), ("2", run.ALL)]
    assert found["rows"][1]["logp_change"] == found["rows"][0]["logp_change"]
    assert [x["depth"] for x in found["rows"][0]["by_depth"]] == [0, 1]
    mean = np.mean([x["logp_change"] for x in found["rows"][0]["by_depth"]])
    assert mean == pytest.approx(found["rows"][0]["logp_change"])
    lines = results.format_results(found).splitlines()
    assert lines[5] == results.SIZES
    assert lines[6].split() == ["plan", "bits/ch", "all", "at", "48", "bytes", "at", "48"]
    assert lines[9] == results.DETAILS
    assert "at 0" in lines[10]
    assert "at 1" in lines[10]
    results.write_results(found, tmp_path)
    assert results.read_results(tmp_path) == json.loads(json.dumps(found))
    for damage in ("{}", '{"logp": [1.0], "rank": 1, "agrees": true, "greedy": []}', "["):
        file = sorted((tmp_path / "kept").iterdir())[0]
        file.write_text(damage)
        with pytest.raises(TurboqError, match="remove it to measure it again") as error:
            table()
        assert "\n" not in str(error.value)


def test_bad_input_is_one_clear_line(model):
    plan = plan_of(model, TurboQuantMSE(dim=16, bits=2))
    other = plan_of(load_model(GOLDEN / "mistral"), Exact(dim=16))
    for match, plans, options in (
        ("plans of different names", [], {}),
        ("plans of different names", [("a", plan, {})] * 2, {}),
        ("another model", [("a", other, {})], {}),
        ("of 300 tokens exceed the model's context of 256", [("a", plan, {})], {"lengths": [300]}),
        ("from 0 to 1", [("a", plan, {})], {"lengths": [48], "depths": [2.0]}),
        ("1 tasks at lengths", [("a", plan, {})], {"lengths": []}),
        ("count=0 must be 1", [("a", plan, {})], {"count": 0}),
    ):
        with pytest.raises(TurboqError, match=match) as error:
            run.measure_tasks(model, plans, [TASK], progress=False, **options)
        assert "\n" not in str(error.value)


def test_results_that_are_damaged_are_one_clear_line(tmp_path):
    for content, match in ((None, "does not exist"), ("{}", "schema: null"), ("[", "not JSON")):
        if content is not None:
            (tmp_path / results.RESULTS).write_text(content)
        with pytest.raises(TurboqError, match=match) as error:
            results.read_results(tmp_path)
        assert "\n" not in str(error.value)


def test_blocks_of_tokens_keep_more_exact(model):
    kivi = KiviKey(dim=16, bits=2, group=32), KiviValue(dim=16, bits=2, group=16)
    assert exact_tokens(plan_of(model, *kivi).kv_layers({})) == [2, 31]
    assert exact_tokens(plan_of(model, TurboQuantMSE(dim=16, bits=2)).kv_layers({})) == [2, 0]
