"""Generation on a kernel, interpreted on a CPU: the tokens of the XLA path."""

from pathlib import Path

import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import uniform_plan
from turboq_calibrate.measure import attention_plugs as plugs
from turboq_calibrate.measure import evaluate
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_kernels.decode.api import IMPLEMENTATIONS

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


@pytest.fixture(scope="module")
def prompt(model):
    return np.random.default_rng(7).integers(0, model.spec.vocab, (2, 7)).astype(np.int32)


def layers_of(model, k, v):
    policy = TokenPolicy(sinks=2, recent=3, exact_dtype="float32")
    return uniform_plan(model_geometry(model), k=k, v=v, policy=policy).kv_layers({})


def check(model, prompt, layers, steps, kernel):
    want = greedy(model, prompt, steps, layers=layers, keep_logits=True, attention="xla")
    got = greedy(model, prompt, steps, layers=layers, keep_logits=True, attention=kernel)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert len(np.unique(want.tokens)) >= steps  # not one token over and over
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=TOL["kernel_logits"])
    assert np.any(got.logits != want.logits)  # another kernel did run


def test_triton_generates_the_same_tokens(model, prompt):
    layers = layers_of(model, TurboQuantMSE(dim=16, bits=3), TurboQuantMSE(dim=16, bits=2))
    check(model, prompt, layers, 4, "triton")


def test_a_named_kernel_refuses_a_codec_without_a_reading(model, prompt):
    layers = layers_of(model, Exact(dim=16), Exact(dim=16))
    with pytest.raises(ValueError, match="codec 'exact' as configured has no reading"):
        greedy(model, prompt, 2, layers=layers, attention="triton")


def test_names_are_those_of_the_kernels():
    assert tuple(plugs.KERNELS) == IMPLEMENTATIONS
    assert set(IMPLEMENTATIONS) < set(evaluate.PLUGS)
    with pytest.raises(TurboqError, match="implementation='cuda'"):
        plugs.cached_by("cuda")
