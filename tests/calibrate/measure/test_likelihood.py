"""Likelihoods of continuations through packed caches, against one pass of the model."""

from pathlib import Path

import numpy as np
import pytest
from plan_cases import random_fit
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, uniform_plan
from turboq_calibrate.measure.likelihood import log_likelihoods
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = ((1, 1), (7, 2), (3, 6), (1, 8), (5, 1))


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


def layers_of(model, codec, **policy):
    geometry = model_geometry(model)
    plan = uniform_plan(geometry, k=codec, v=codec, policy=TokenPolicy(**policy))
    return plan.kv_layers(collect_arrays(plan, random_fit(geometry)))


def pairs_of(model):
    """Random ones; the last one's continuation is what greedy decoding writes."""
    rng = np.random.default_rng(2)
    pairs = [tuple(rng.integers(0, model.spec.vocab, n).tolist() for n in size) for size in SIZES]
    context = pairs[-1][0]
    best = int(np.argmax(np.asarray(forward(model, np.array([context]))[0])[0, -1]))
    return [*pairs[:-1], (context, [best])]


def test_an_exact_cache_scores_as_one_pass_does(model):
    layers = layers_of(model, Exact(dim=16, dtype="float32"))
    pairs = pairs_of(model)
    done = []
    found = log_likelihoods(model, layers, pairs, batch=2, chunk=4, step=done.append)
    assert done == [2, 2, 1]
    tokens = np.zeros((len(pairs), 9), np.int32)
    for row, (a, b) in zip(tokens, pairs, strict=True):
        row[: len(a) + len(b)] = [*a, *b]
    logits = np.asarray(forward(model, tokens)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for i, (a, b) in enumerate(pairs):
        at = range(len(a) - 1, len(a) + len(b) - 1)
        due = sum(logp[i, t, token] for t, token in zip(at, b, strict=True))
        greedy = all(logits[i, t].argmax() == token for t, token in zip(at, b, strict=True))
        assert found[i][0] == pytest.approx(due, abs=len(b) * TOL["decode_exact"])
        assert found[i][1] == greedy
    assert found[-1][1]
    assert not found[1][1]


def test_a_quantized_cache_scores_a_pair_as_it_does_alone(model):
    layers = layers_of(model, TurboQuantMSE(dim=16, bits=2), sinks=1)
    pairs = pairs_of(model)
    found = log_likelihoods(model, layers, pairs, batch=3, chunk=4)
    exact = log_likelihoods(model, layers_of(model, Exact(dim=16)), pairs, batch=3, chunk=4)
    for i, pair in enumerate(pairs[:2]):
        (alone,) = log_likelihoods(model, layers, [pair], chunk=4)
        assert found[i][0] == pytest.approx(alone[0], abs=len(pair[1]) * TOL["decode_exact"])
    assert max(abs(a[0] - b[0]) for a, b in zip(found, exact, strict=True)) > 0.01


def test_bad_pairs_are_one_line(model):
    layers = layers_of(model, Exact(dim=16))
    assert log_likelihoods(model, layers, []) == []
    for pair, message in (
        (([], [1]), "pair 0: context and continuation need one token"),
        (([1], []), "pair 0: context and continuation need one token"),
        (([1] * 200, [1] * 58), "pair 0: .*257.* 256"),
    ):
        with pytest.raises(TurboqError, match=message):
            log_likelihoods(model, layers, [pair])
