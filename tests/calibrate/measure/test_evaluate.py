"""The quality table against an independent float64 evaluation of a tiny random model."""

import csv
import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from plan_cases import random_fit
from tolerances import TOL

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import attend_to, simulate, simulated_attention
from turboq.codecs import Exact, PerHead, Transform, TurboQuantMSE, TurboQuantProd
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, head_plan, uniform_plan
from turboq_calibrate.cost import metrics
from turboq_calibrate.measure import evaluate as evaluation
from turboq_calibrate.measure import quality_table as quality
from turboq_calibrate.measure.attention_plugs import head_errors
from turboq_calibrate.measure.evaluate import evaluate, evaluate_texts
from turboq_calibrate.measure.teacher_forced import hidden_states, score
from turboq_calibrate.models import (
    decoder,
    default_positions,
    embed_tokens,
    exact_attend,
    forward,
    load_model,
)
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2, recent=3, exact_dtype="float32")
LENGTH = 21


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


@pytest.fixture(scope="module")
def windows(model):
    shape = (3, LENGTH)
    return np.random.default_rng(7).integers(0, model.spec.vocab, shape).astype(np.int32)


def named(model, name, k, v=None, policy=POLICY):
    geometry = model_geometry(model)
    plan = uniform_plan(geometry, k=k, v=v or k, policy=policy)
    return name, plan, collect_arrays(plan, random_fit(geometry))


@pytest.fixture(scope="module")
def plans(model):
    def choose(index, side, head):
        return TurboQuantMSE(dim=16, bits=2 + head)

    mixed = head_plan(model_geometry(model), choose, policy=POLICY)
    return [
        named(model, "exact", Exact(dim=16, dtype="float32")),
        named(model, "mse 2", TurboQuantMSE(dim=16, bits=2)),
        named(model, "prod 3", TurboQuantProd(dim=16, bits=3), TurboQuantMSE(dim=16, bits=4)),
        named(model, "learned", PerHead(dim=16, bits=3, scale="head"), policy=TokenPolicy(sinks=1)),
        ("mixed", mixed, {}),
    ]


@pytest.fixture(scope="module")
def measured(model, plans, windows):
    return evaluate(model, plans, windows, text="noise", progress=False)


def log_softmax_f64(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def first_scored(policy):
    """Of per-token codecs: position t reads tokens sinks .. t - recent quantized."""
    return policy.sinks + policy.recent


def independent(model, plan, arrays, windows):
    """The same quantities from whole logits of one window at a time, in float64, at the positions
    that can see a quantized token."""
    layers = [plan.kv_layer(i, arrays) for i in range(len(model.spec.layers))]

    def plug(spec, q, k, v, positions, layer):
        return simulated_attention(layer, q, k, v, scale=spec.scale), layer

    kl, nll, nll_exact, top1 = [], [], [], []
    for window in windows:
        p = log_softmax_f64(forward(model, window[None])[0][0, :-1])
        q = log_softmax_f64(forward(model, window[None], plug, layers)[0][0, :-1])
        at = np.arange(len(window) - 1), window[1:]
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        nll.append(-q[at])
        nll_exact.append(-p[at])
        top1.append(p.argmax(-1) == q.argmax(-1))
    first = first_scored(plan.tokens)
    return [np.array(x)[:, first:] for x in (kl, nll, nll_exact, top1)]


def test_rows_match_an_independent_evaluation(model, plans, windows, measured):
    (text,) = measured.table["texts"]
    assert (text["text"], text["windows"], text["window_tokens"]) == ("noise", 3, LENGTH)
    assert text["tokens"] == 60
    assert [r["name"] for r in measured.rows] == [name for name, _, _ in plans]
    for row, (_, plan, arrays) in zip(measured.rows, plans, strict=True):
        kl, nll, nll_exact, top1 = independent(model, plan, arrays, windows)
        close = {"rel": TOL["kl_model_rel"], "abs": TOL["kl_model_abs"]}
        assert row["kl_mean"] == pytest.approx(kl.mean(), **close)
        assert row["kl_median"] == pytest.approx(np.median(kl), **close)
        assert row["kl_p99"] == pytest.approx(np.percentile(kl, 99), **close)
        want = metrics.bootstrap_ci(kl.mean(axis=1))
        np.testing.assert_allclose(row["kl_ci"], want, close["rel"], close["abs"])
        assert row["top1"] == top1.mean()
        rel = TOL["model_nll"]
        assert row["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=rel)
        assert row["perplexity_ratio"] == pytest.approx(np.exp((nll - nll_exact).mean()), rel=rel)
        assert row["perplexity_exact"] == pytest.approx(np.exp(nll_exact.mean()), rel=rel)
        assert row["scored_positions"] == kl.size
        last = LENGTH - 1 - plan.tokens.recent  # what the last scored position reads
        quantized = 0 if row["name"] == "exact" else 3 * (last - plan.tokens.sinks)
        assert row["quantized_tokens"] == quantized


def test_targets_are_the_next_tokens(model, windows, measured):
    """What a shift of the targets by one would give is far from what is reported."""
    p = [log_softmax_f64(forward(model, w[None])[0][0]) for w in windows]
    wrong = [-q[np.arange(LENGTH), w].mean() for q, w in zip(p, windows, strict=True)]
    right = [-q[np.arange(LENGTH - 1), w[1:]].mean() for q, w in zip(p, windows, strict=True)]
    assert abs(np.mean(wrong) - np.mean(right)) > 100 * TOL["model_nll"]
    perplexity = measured.table["texts"][0]["perplexity"]
    assert perplexity == pytest.approx(np.exp(np.mean(right)), rel=TOL["model_nll"])


def test_exact_plan_loses_nothing(measured):
    row = measured.rows[0]
    assert 0 <= row["kl_mean"] <= TOL["kl_model_abs"]
    assert row["kl_p99"] <= TOL["kl_model_abs"]
    assert row["top1"] == 1
    assert row["perplexity"] == pytest.approx(row["perplexity_exact"], rel=TOL["model_nll"])


def test_more_bits_lose_less(model, windows):
    plans = [named(model, str(b), TurboQuantMSE(dim=16, bits=b)) for b in (2, 4)]
    rows = evaluate(model, plans, windows, text="noise", progress=False).rows
    assert rows[0]["kl_mean"] > 2 * rows[1]["kl_mean"] > 0


def test_packed_cache_gives_the_simulated_numbers(model, windows):
    tokens, plans = windows[:2], [named(model, "plan", PerHead(dim=16, bits=2))]
    simulated, packed = (
        evaluate(model, plans, tokens, text="noise", attention=a, progress=False)
        for a in ("simulated", "packed")
    )
    assert packed.table["attention"] == "packed"
    for a, b in zip(simulated.rows, packed.rows, strict=True):
        assert a["kl_mean"] > 10 * TOL["kl_packed"]
        for key in ("kl_mean", "kl_median", "kl_p99"):
            assert a[key] == pytest.approx(b[key], abs=TOL["kl_packed"])
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=TOL["kl_packed"])


def test_two_runs_write_the_same_bytes(model, plans, windows, measured, tmp_path):
    again = evaluate(model, plans, windows, text="noise", progress=False)
    for name, q in (("a", measured), ("b", again)):
        quality.write_quality(q, tmp_path / name)
    for file in (quality.QUALITY, quality.TABLE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert again.run["seconds"] > 0
    assert again.run["peak_memory_bytes"] > 2**20


def test_batches_and_blocks_change_nothing(model, plans, windows, measured, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)  # 42 positions: blocks that cross windows, padding
    other = evaluate(model, plans[1:3], windows, text="noise", window_batch=2, progress=False)
    for a, b in zip(measured.rows[1:3], other.rows, strict=True):
        for key in ("kl_mean", "kl_p99", "top1", "perplexity"):
            assert a[key] == pytest.approx(
                b[key], rel=TOL["kl_model_rel"], abs=TOL["kl_model_abs"]
            ), key
    for name, errors in other.table["head_errors"]["noise"].items():
        for key, values in errors.items():
            before = measured.table["head_errors"]["noise"][name][key]
            np.testing.assert_allclose(values, before, rtol=TOL["head_errors"], err_msg=key)


def test_compiles_once_per_codec_profile(model, windows):
    """Two equal layers and many windows: one program per profile, one for what they share."""
    plans = [named(model, "mse", TurboQuantMSE(dim=16, bits=2))]
    assert model.spec.layers[0] == model.spec.layers[1]
    programs = (decoder.run_project, attend_to, simulate)
    before = [f._cache_size() for f in programs]
    evaluate(model, plans, windows[:, :17], text="noise", progress=False)
    assert [f._cache_size() - n for f, n in zip(programs, before, strict=True)] == [1, 1, 1]


def test_storage_columns(model, plans, measured):
    rows = {r["name"]: r for r in measured.rows}
    # D = 16, so one float16 scale is one bit per channel; 2 layers x 2 heads x (K and V).
    assert rows["mse 2"]["bits_per_channel"] == 3
    assert rows["mse 2"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 3 / 8
    assert rows["mse 2"]["compression"] == pytest.approx(16 / 3)
    assert (rows["prod 3"]["k_bits"], rows["prod 3"]["v_bits"]) == (3, 4)
    assert rows["prod 3"]["bits_per_channel"] == (3 + 2 + 4 + 1) / 2  # K also stores gamma
    assert rows["prod 3"]["codec"] == "turboquant_prod/turboquant_mse"
    assert rows["learned"]["bits_per_channel"] == 3  # per-head scales are not stored per vector
    assert rows["mixed"]["k_bits"] == 2.5
    assert rows["exact"]["bits_per_channel"] == 32
    for name, plan, _ in plans:
        want = accounting.residency(plan.storage, context=model.spec.context)
        assert rows[name]["bits_per_channel_at_context"] == want.bits_per_channel
        assert rows[name]["cache_bytes"][str(model.spec.context)] == want.total
        assert rows[name]["bits_per_channel_at_context"] > rows[name]["bits_per_channel"]
    assert rows["learned"]["policy"] == {"sinks": 1, "recent": 0, "exact_dtype": "bfloat16"}


def test_head_errors_against_float64(model, plans, rng):
    _, plan, arrays = plans[-1]
    layer = plan.kv_layer(0, arrays)
    q, k, v = (rng.standard_normal((2, 9, n, 16)).astype(np.float32) for n in (4, 2, 2))
    k += 3  # a common mean, which no softmax sees
    exact = (jnp.asarray(k), jnp.asarray(v))
    k_hat, v_hat = (np.asarray(x, np.float64) for x in simulate(layer, *exact))
    got = head_errors(jnp.asarray(q), exact, simulate(layer, *exact), POLICY.sinks, 0.25)
    stored = slice(POLICY.sinks, None)
    for b in range(2):
        for h in range(2):
            error = (k_hat - k)[b, stored, h]
            error = error - error.mean(axis=0)
            signal = k[b, stored, h] - k[b, stored, h].mean(axis=0, dtype=np.float64)
            queries = q[b, :, 2 * h : 2 * h + 2].reshape(-1, 16).astype(np.float64)
            logit = 0.25 * queries @ error.T
            lost = (v_hat - v)[b, stored, h]
            want = {
                "k_logit_mse": (logit**2).mean(),
                "k_rel_mse": (error**2).sum() / (signal**2).sum(),
                "v_rel_mse": (lost**2).sum() / (v[b, stored, h].astype(np.float64) ** 2).sum(),
            }
            for name, value in want.items():
                assert float(got[name][b, h]) == pytest.approx(value, rel=TOL["head_errors"]), name


def test_reported_head_errors_are_means_over_windows(model, plans, windows, measured):
    name, plan, arrays = plans[1]
    seen = []

    def plug(spec, q, k, v, positions, state):
        stored = simulate(state, k, v)
        seen.append(head_errors(q, (k, v), stored, POLICY.sinks, spec.scale))
        return exact_attend(spec, q, k, v, positions, None)

    # The first layer sees the same keys in the exact and in the quantized run.
    layer, spec, params = plan.kv_layer(0, arrays), model.spec.layers[0], model.layer(0)
    for window in windows:
        tokens = jnp.asarray(window[None])
        x = embed_tokens(model, tokens)
        decoder.layer(spec, params, x, default_positions(tokens), plug, layer)
    want = np.sqrt(np.mean([s["k_logit_mse"][0] for s in seen], axis=0))
    got = measured.table["head_errors"]["noise"][name]["k_logit_rms"][0]
    np.testing.assert_allclose(got, want, rtol=TOL["head_errors"])
    assert len(measured.table["head_errors"]["noise"][name]["v_rel_mse"]) == 2


def test_bad_input_is_one_clear_line(model, plans, windows):
    other = load_model(GOLDEN / "mistral")
    cases = [
        ("no plans", ([], windows)),
        ("must differ", ([plans[0], plans[0]], windows)),
        ("another model", ([named(other, "x", Exact(dim=16))], windows)),
        ("two tokens", (plans[:1], windows[:, :1])),
        ("exceed the model's context of 256", (plans[:1], np.zeros((1, 257), np.int32))),
        ("within 0..319", (plans[:1], windows + 320)),
    ]
    for match, (which, tokens) in cases:
        with pytest.raises(TurboqError, match=match) as error:
            evaluate(model, which, tokens, text="noise", progress=False)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="attention='fast'"):
        evaluate(model, plans[:1], windows, text="noise", attention="fast", progress=False)


def test_predictions_that_are_not_finite_are_refused(plans, windows):
    model = load_model(GOLDEN / "llama3")
    head = model.head_params()
    model._head = head | {"norm": head["norm"].at[3].set(jnp.nan)}
    with pytest.raises(TurboqError, match="exact model: predictions are not finite in window 0"):
        evaluate(model, plans[:1], windows, text="noise", progress=False)


def test_a_plan_that_is_not_finite_is_explained_and_others_are_kept(windows):
    """Values of one head far beyond float16 in one layer, as wide scales hold them."""
    model = load_model(GOLDEN / "llama3")
    params = model.layer(1)
    dim = model.spec.layers[1].v_head_dim
    wide = params["v"].at[dim : 2 * dim].multiply(1e7)  # V of head 1
    model._layers[1] = params | {"v": wide}
    rows = [
        named(model, kind, TurboQuantMSE(dim=16, bits=3, scale_dtype=kind))
        for kind in ("float16", "bfloat16")
    ]
    with pytest.raises(evaluation.NotFinite) as error:
        evaluate(model, rows, windows, text="noise", progress=False)
    message = str(error.value)
    assert re.fullmatch(
        r"float16: predictions are not finite at position \d+ of window 0: layer 1, v of head 1, "
        r"token \d+ \(norm [0-9.e+]+\): its scale exceeds float16: plan with "
        r"--scale_dtype=bfloat16",
        message,
    ), message
    assert error.value.quality is not None
    assert [row["name"] for row in error.value.quality.rows] == ["bfloat16"]
    with pytest.raises(evaluation.NotFinite) as alone:
        evaluate(model, rows[:1], windows, text="noise", progress=False)
    assert alone.value.quality is None


def test_files_and_table(measured, tmp_path):
    path = quality.write_quality(measured, tmp_path / "new")
    raw = json.loads(path.read_text())
    needed = {
        "codec", "k_bits", "v_bits", "bits_per_channel", "text", "kl_mean", "kl_ci", "kl_p99",
        "top1", "perplexity", "bytes_per_token",
    }  # fmt: skip
    assert raw["schema"] == 2
    assert raw["model"] == measured.table["model"]
    assert all(needed <= set(row) for row in raw["rows"])
    assert quality.read_quality(tmp_path / "new").table == measured.table
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / quality.TABLE).read_text())))
    assert tuple(rows[0]) == quality.COLUMNS
    for text, row in zip(rows, measured.rows, strict=True):
        assert float(text["kl_mean"]) == row["kl_mean"]
        assert [float(text["kl_ci_lo"]), float(text["kl_ci_hi"])] == row["kl_ci"]
        assert int(text["recent"]) == row["policy"]["recent"]
    lines = quality.format_table(measured).splitlines()
    assert len(lines) == 3 + len(rows) + 5  # two policies, and the exact plan quantizes nothing
    assert lines[-1].startswith("exact tokens differ, so plans do not compare: first 2 and last 3 ")
    assert lines[1].split()[:2] == ["plan", "bits/ch"]
    assert len({len(line) for line in lines[1 : 3 + len(rows)]}) == 1  # aligned
    lines = lines[: 3 + len(rows) + 3]
    assert lines[-3].startswith("exact: nothing quantized, 45 of 60 positions scored")
    assert lines[-2].startswith("mse 2, prod 3, mixed: 45 tokens quantized, 45 of 60 positions")
    assert lines[-1].startswith("learned: 57 tokens quantized, 57 of 60 positions scored")


def test_one_window_has_no_interval(model, plans, windows, tmp_path):
    one = evaluate(model, plans[1:2], windows[:1], text="noise", progress=False)
    assert one.rows[0]["kl_ci"] is None
    quality.write_quality(one, tmp_path)
    assert quality.read_quality(tmp_path).rows[0]["kl_ci"] is None
    assert "interval" not in quality.format_table(one)  # no column of dashes


def test_positions_of_the_window(rng):
    """Buckets double; only positions from `first` on count; those without any say so."""
    kl = rng.exponential(size=(3, 1500))
    found = metrics.kl_by_position(kl, 300)
    edges = [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    assert [(b["start"], b["end"]) for b in found] == edges
    assert found[0]["kl_mean"] is None
    assert found[0]["positions"] == 0
    for bucket, (start, end) in zip(found[1:], [(300, 512), *edges[2:]], strict=True):
        values = [kl[w, t] for w in range(3) for t in range(start, end)]
        assert bucket["positions"] == len(values)
        assert bucket["kl_mean"] == pytest.approx(sum(values) / len(values), rel=TOL["f64"])
    assert [b["end"] for b in metrics.kl_by_position(kl[:, :256])] == [256]
    assert [b["end"] for b in metrics.kl_by_position(kl[:, :257])] == [256, 257]


def test_quality_by_position_against_loops(rng, monkeypatch):
    """Buckets end at 1024, 4096, ...; intervals are of resampled windows, taken whole."""
    monkeypatch.setattr(metrics, "LENGTHS", (10, 40))
    kl, nll, exact = (rng.exponential(size=(5, 57)) for _ in range(3))
    top1 = (rng.random((5, 57)) < 0.7).astype(float)
    tokens = metrics.TokenMetrics(kl=kl, nll=nll, nll_exact=exact, top1=top1)
    drawn = metrics._resamples(5, 50, 3)
    found = tokens.by_position(4, samples=50, seed=3)
    edges = [(0, 10), (10, 40), (40, 57)]
    assert [(b["start"], b["end"]) for b in found] == edges
    for bucket, (start, end) in zip(found, edges, strict=True):
        at = slice(max(start, 4), end)
        assert bucket["positions"] == 5 * (end - max(start, 4))
        want = {
            "kl_mean": lambda w, at=at: kl[w, at].mean(),
            "kl_p99": lambda w, at=at: np.percentile(kl[w, at], 99),
            "kl_p999": lambda w, at=at: np.percentile(kl[w, at], 99.9),
            "top1": lambda w, at=at: top1[w, at].mean(),
            "perplexity_ratio": lambda w, at=at: (nll - exact)[w, at].mean(),
        }
        for name, of in want.items():
            shown = np.exp if name == "perplexity_ratio" else np.asarray
            assert bucket[name] == pytest.approx(shown(of(np.arange(5))), rel=TOL["f64"]), name
            ci = shown(np.quantile([of(w) for w in drawn], [0.025, 0.975]))
            np.testing.assert_allclose(bucket[f"{name}_ci"], ci, rtol=TOL["f64"], err_msg=name)
    assert [b["start"] for b in tokens.by_position(12)] == [10, 40]
    one = metrics.TokenMetrics(kl=kl[:1], nll=nll[:1], nll_exact=exact[:1], top1=top1[:1])
    assert one.by_position()[0]["kl_p99_ci"] is None


def test_rows_hold_their_buckets(model, plans, rng, monkeypatch):
    """Weighted by their positions, the buckets' means are the row's; long windows print them."""
    monkeypatch.setattr(quality, "LONG", 100)
    tokens = rng.integers(0, model.spec.vocab, (2, 256)).astype(np.int32)
    found = evaluate(model, plans[1:3], tokens, text="noise", progress=False)
    for row in found.rows:
        (bucket,) = row["kl_by_position"]
        assert (bucket["start"], bucket["end"]) == (0, 255)
        assert bucket["positions"] == row["scored_positions"] == 2 * (255 - 5)
        assert bucket["kl_mean"] == pytest.approx(row["kl_mean"], rel=TOL["f64"])
    lines = quality.format_table(found).splitlines()
    assert lines[-5] == "noise: by position"
    assert lines[-4].split()[:4] == ["plan", "positions", "KL", "mean"]
    assert [line.split()[2] for line in lines[-2:]] == ["0..254"] * 2


def test_a_plan_that_quantizes_nothing_is_refused(model, windows):
    """But exact codecs measure rounding, with whatever policy: all positions."""
    policy = TokenPolicy(sinks=4, recent=LENGTH)
    plan = named(model, "mse", TurboQuantMSE(dim=16, bits=2), policy=policy)
    with pytest.raises(TurboqError, match=r"plan 'mse'.*4 sinks and 21 recent.*window of 21"):
        evaluate(model, [plan], windows, text="noise", progress=False)
    plan = named(model, "exact", Exact(dim=16, dtype="float32"), policy=policy)
    (row,) = evaluate(model, [plan], windows, text="noise", progress=False).rows
    assert (row["quantized_tokens"], row["scored_positions"]) == (0, 60)


def test_no_divergence_before_the_first_scored_position(model, plans, windows):
    """What is left out is left out because nothing quantized can be seen there, and no more."""
    _, plan, arrays = plans[1]
    layers = [plan.kv_layer(i, arrays) for i in range(len(model.spec.layers))]
    hidden, _ = hidden_states(
        model, {"mse 2": layers}, windows, evaluation.PLUGS["simulated"], lambda layer: None
    )
    _, rows = score(model, hidden, windows)
    kl = np.array([m["kl"] for m in rows["mse 2"]])
    first = first_scored(POLICY)  # exact tokens are float32 here
    assert kl[:, :first].max() <= TOL["kl_model_abs"]
    assert kl[:, first].min() > 1000 * TOL["kl_model_abs"]


@pytest.fixture
def texts(windows):
    return {"noise": windows[:2], "more noise": windows[1:, :17]}


def test_texts_are_measured_by_themselves(model, plans, texts):
    some = plans[1:4]
    both = evaluate_texts(model, some, texts, progress=False, plan_batch=2)
    for text, tokens in texts.items():
        one = evaluate(model, some, tokens, text=text, progress=False)
        assert both.rows_of(text) == one.rows
        assert both.table["head_errors"][text] == one.table["head_errors"][text]
        assert one.table["texts"] == [t for t in both.table["texts"] if t["text"] == text]
    lines = quality.format_table(both).splitlines()
    assert lines[1].split()[-3:] == ["noise", "more", "noise"]
    for line, (name, _, _) in zip(lines[3:6], some, strict=True):
        kl = {text: next(r["kl_mean"] for r in both.rows_of(text) if r["name"] == name)
              for text in texts}  # fmt: skip
        worst = max(kl, key=kl.get)
        assert line.startswith(name)
        assert line.count("*") == 1
        assert f"{kl[worst]:.4f}*" in line


def test_interrupted_and_continued_is_the_same_table(model, plans, texts, tmp_path, monkeypatch):
    """Every window is kept by itself; what is only a summary of it is made again."""
    some, whole = plans[1:4], evaluate_texts(model, plans[1:4], texts, progress=False)
    calls, measure = [], evaluation._measure

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    def counted(*args):
        calls.append(args[5])
        return measure(*args)

    def again(which=some, **options):
        calls.clear()
        return evaluate_texts(
            model, which, texts, progress=False, plan_batch=2, folder=tmp_path, **options
        )

    monkeypatch.setattr(evaluation, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again()
    monkeypatch.setattr(evaluation, "_measure", counted)
    found = again()
    assert calls == ["more noise", *(["noise"] * 2), *(["more noise"] * 2)]  # 3 of 8 were kept
    assert found.table == whole.table
    assert (found.run["windows_measured"], found.run["windows_reused"]) == (3 + 4 * 2, 3 * 3)
    assert again().run["seconds_per_plan_and_window"] is None  # all of it reused
    assert calls == []
    assert again(seed=1, context=64).table["bootstrap"]["seed"] == 1
    assert calls == []
    name, plan, arrays = some[2]
    other = {key: x + 1 if key.endswith("mean") else x for key, x in arrays.items()}
    again([*some[:2], (name, plan, other)])
    assert calls == ["noise", "noise", "more noise", "more noise"]  # the second batch of plans
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    held = safetensors.numpy.load(file.read_bytes())
    for damage in (
        b"{}",
        safetensors.numpy.save({k: x for k, x in held.items() if k != "kl"}),
        safetensors.numpy.save(held | {"kl": held["kl"][:, :, 1:].copy()}),
        safetensors.numpy.save({k: x.astype(np.float32) for k, x in held.items()}),
    ):
        file.write_bytes(damage)
        with pytest.raises(TurboqError, match=r"\.safetensors: .*remove it to measure") as error:
            again()
        assert "\n" not in str(error.value)
        assert calls == []  # found before anything is measured


def test_step_by_step_against_one_pass_and_float64(model, plans, windows, tmp_path):
    """The last positions, fed to the packed cache one by one: an engine's way to the same KL."""
    some = [
        plans[1],
        plans[3],
        named(model, "mixed 2", Transform(dim=16, segments=((8, 4), (8, 1)), gain="code")),
    ]
    found = evaluate(model, some, windows, text="noise", steps=4, progress=False, folder=tmp_path)
    plain = evaluate(model, some, windows, text="noise", progress=False)
    for row, without, (_, plan, arrays) in zip(found.rows, plain.rows, some, strict=True):
        steps = row["steps"]
        assert {k: x for k, x in row.items() if k != "steps"} == without
        kl, _, _, top1 = independent(model, plan, arrays, windows)
        close = {"rel": TOL["kl_model_rel"], "abs": TOL["kl_packed"]}
        assert steps["positions"] == 3 * 4
        assert steps["kl_one_pass"] == pytest.approx(kl[:, -4:].mean(), **close)
        assert steps["kl_steps"] == pytest.approx(kl[:, -4:].mean(), **close)
        assert steps["kl_steps"] > 10 * TOL["kl_packed"]
        assert steps["largest"] <= TOL["kl_packed"]
        assert steps["top1_steps"] == steps["top1_one_pass"] == top1[:, -4:].mean()
    again = evaluate(model, some, windows, text="noise", steps=4, progress=False, folder=tmp_path)
    assert (again.table, again.run["windows_measured"]) == (found.table, 0)
    assert "noise: through the packed cache" in quality.format_table(found)
    with pytest.raises(TurboqError, match="steps=21 must be less than the 21 tokens"):
        evaluate(model, some, windows, text="noise", steps=21, progress=False)


def test_step_by_step_beside_delta_nets():
    """Layers without a cache carry their state from step to step: the KL of one pass."""
    model = load_model(GOLDEN / "qwen3_5")
    windows = np.random.default_rng(2).integers(0, model.spec.vocab, (2, 24)).astype(np.int32)
    plan = named(model, "mse 1", TurboQuantMSE(dim=16, bits=1), policy=TokenPolicy(sinks=1))
    found = evaluate(
        model, [plan], windows, text="noise", steps=4, attention="packed", progress=False
    )
    steps = found.rows[0]["steps"]
    assert steps["kl_steps"] > 10 * TOL["kl_packed"]
    assert steps["largest"] <= TOL["kl_packed"]
    errors = found.table["head_errors"]["noise"]["mse 1"]["v_rel_mse"]
    assert [layer is not None for layer in errors] == [False, True, False]


def test_output_folder_that_is_a_file(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboqError, match="is a file"):
        quality.write_quality(measured, tmp_path / "file")
