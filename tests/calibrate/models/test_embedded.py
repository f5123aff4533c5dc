"""The embedded default, SmolLM2-135M-Instruct, as transformers sees the same GGUF file."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tolerances import TOL

from turboq.errors import TurboqError
from turboq_calibrate.models import exact_attend, forward, load_model

GOLDEN = Path(__file__).parents[2] / "golden"
PASSAGE = (GOLDEN / "passage.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "smollm2_135m.npz") as file:
        return dict(file)


def test_geometry(model):
    spec = model.spec
    assert (spec.family, len(spec.layers), spec.context, spec.vocab) == ("llama", 30, 8192, 49152)
    layer = spec.layers[0]
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.hidden) == (9, 3, 64, 576)
    assert spec.tied_embeddings
    assert layer.rope.theta == 100000.0
    assert len(set(spec.layers)) == 1


def test_logits_keys_and_perplexity(model, golden):
    def last_keys(spec, q, k, v, positions, state):
        return exact_attend(spec, q, k, v, positions, None)[0], k

    logits, states = forward(model, golden["tokens"], last_keys)
    logits = np.asarray(logits[0])
    top = np.take_along_axis(logits, golden["top"], axis=-1)
    np.testing.assert_allclose(top, golden["top_logits"], rtol=0, atol=TOL["embedded_logits"])
    normalizer = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(
        normalizer, golden["normalizer"], rtol=0, atol=TOL["embedded_logits"]
    )
    keys = np.asarray(states[29])[0, ::8]
    np.testing.assert_allclose(keys, golden["k29"], rtol=0, atol=TOL["embedded_logits"])
    nll = normalizer[:-1] - logits[np.arange(len(logits) - 1), golden["tokens"][0, 1:]]
    perplexity = float(golden["perplexity"])
    assert np.exp(nll.mean()) == pytest.approx(perplexity, rel=TOL["embedded_perplexity"])


def test_tokenizer(model, golden):
    ids = model.tokenizer.encode(PASSAGE)
    assert ids == golden["tokens"][0].tolist()
    assert model.tokenizer.decode(ids) == PASSAGE
    assert (model.tokenizer.bos_id, model.tokenizer.eos_ids) == (1, (2,))
    assert model.tokenizer.encode("<|im_start|>user") == [1, *model.tokenizer.encode("user")]
    # Digits one by one, and the vocabulary's gap: it has no token for some control bytes.
    assert len(model.tokenizer.encode("2048")) == 4
    with pytest.raises(TurboqError, match="for which the model's vocabulary has no token"):
        model.tokenizer.encode("\x06")


def test_all_layers_share_one_compiled_function(model):
    traces = []

    def counting(spec, q, k, v, positions, state):
        traces.append(spec)
        return exact_attend(spec, q, k, v, positions, state)

    forward(model, np.arange(8)[None], counting)
    assert len(traces) == 1


def test_streamed_layers_are_the_resident_ones(model):
    streamed = load_model("embedded", resident=False)
    for i in (0, 29):
        for name, value in streamed.layer(i).items():
            np.testing.assert_array_equal(value, model.layer(i)[name])
    assert streamed.fingerprint == model.fingerprint
