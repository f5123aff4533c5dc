"""Text that the model writes: drawn from its own distribution, the same whenever it is drawn."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tolerances import TOL

from turboq.errors import TurboqError
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.models.tokenizer import from_folder
from turboq_calibrate.observe import self_text, texts
from turboq_calibrate.observe.self_text import seed_of, self_windows, start_token, text_source
from turboq_calibrate.observe.texts import mixed_windows

GOLDEN = Path(__file__).parents[2] / "golden"
START = 0  # BOS of the golden models


def golden(name):
    """A golden model; those without a tokenizer borrow one, of which only BOS is used."""
    model = load_model(GOLDEN / name)
    model.__dict__["tokenizer"] = from_folder(GOLDEN / "llama3")
    return model


@pytest.fixture(scope="module")
def model():
    return golden("llama3")


def written(model, **changes):
    arguments = {"seed": 3, "length": 12, "count": 5, "batch": 2, "progress": False} | changes
    return self_windows(model, **arguments)


def test_first_tokens_are_draws_from_the_models_probabilities(model):
    """Pearson's chi-square over tokens expected at least 5 times, the rest as one cell.

    Its distribution is chi-square with cells - 1 degrees: a correct sampler exceeds the threshold
    as rarely as 4 standard errors, once in 16,000.
    """
    count = 4096
    tokens = written(model, length=2, count=count, batch=1024)
    assert (tokens[:, 0] == START).all()
    logits = np.asarray(forward(model, np.full((1, 1), START, np.int32))[0], np.float64)[0, 0]
    expected = count * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    observed = np.bincount(tokens[:, 1], minlength=len(expected))
    common = expected >= 5
    assert common.sum() > 10
    cells = np.stack(
        [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
    )  # fmt: skip
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    threshold = stats.chi2.isf(2 * stats.norm.sf(TOL["standard_errors"]), common.sum())
    assert statistic < threshold
    # The test has teeth: at temperature 1.25 the same counts are far out.
    flat = np.exp((logits - logits.max()) / 1.25)
    flat = np.append(flat[common], flat[~common].sum()) * count / flat.sum()
    assert ((cells[0] - flat) ** 2 / flat).sum() > 2 * threshold


# Grouped heads; a sliding window of 6; QK-norm and three layers of another geometry; delta-nets;
# latent vectors; shared caches; Mamba-2 mixers.
@pytest.mark.parametrize(
    "name",
    ["llama3", "mistral", "qwen3", "qwen3_5", "deepseek_v2", "gemma4", "granite_hybrid_dense"],
)
def test_cached_steps_are_the_parallel_forward(name):
    """The logits of one causal pass over the windows, with the same noise, draw the same tokens.

    Only where the best two lie within rounding of each other may the draws differ.
    """
    model = golden(name)
    tokens = written(model, length=70, count=3)  # two blocks, the second cut short
    logits = np.asarray(forward(model, tokens)[0], np.float64)[:, :-1]
    key = jax.random.key(3, impl="threefry2x32")
    for n, row in enumerate(logits):
        keys = [jax.random.fold_in(jax.random.fold_in(key, n), t) for t in range(len(row))]
        noise = np.stack(
            [np.asarray(jax.random.gumbel(k, row.shape[1:], jnp.float32)) for k in keys]
        )
        score = row + noise
        second, best = np.sort(score, axis=1)[:, -2:].T
        clear = best - second > 2 * TOL["model_golden"]
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(tokens[n, 1:][clear], score.argmax(axis=1)[clear])
    assert len(np.unique(tokens)) > 20


def test_a_window_is_the_same_whatever_is_drawn_with_it(model):
    tokens = written(model)
    assert tokens.shape == (5, 12)
    assert tokens.dtype == np.int32
    for changes in ({"count": 1}, {"count": 3}, {"batch": 5}, {"batch": 1}):
        other = written(model, **changes)
        np.testing.assert_array_equal(other, tokens[: len(other)])
    np.testing.assert_array_equal(written(model, length=5), tokens[:, :5])
    assert len(np.unique(tokens, axis=0)) == 5
    assert (written(model, seed=4) != tokens).mean() > 0.5
    np.testing.assert_array_equal(
        self_windows(
            load_model(GOLDEN / "llama3", resident=False), seed=3, length=12, count=5, batch=2,
            progress=False,
        ),
        tokens,
    )  # fmt: skip


def test_blocks_and_batches_share_one_executable(model):
    before = self_text.write_block._cache_size()
    written(model, length=200, count=4, batch=1)
    assert self_text.write_block._cache_size() - before == 1


KILLED = """
import os, signal, sys
from turboq_calibrate.models import load_model
from turboq_calibrate.observe import self_text, texts
real = self_text.write_block
calls = 0
def stop(*a, **k):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
self_text.write_block = stop
self_text.self_windows(
    load_model(sys.argv[1]), seed=3, length=12, count=5, batch=2, folder=sys.argv[2], progress=False
)
"""


def test_killed_and_run_again_it_goes_on(model, tmp_path, monkeypatch):
    whole = written(model)
    killed = subprocess.run([sys.executable, "-c", KILLED, GOLDEN / "llama3", tmp_path])
    assert killed.returncode == -9
    calls = []
    real = self_text.write_block
    monkeypatch.setattr(self_text, "write_block", lambda *a, **k: calls.append(a) or real(*a, **k))
    np.testing.assert_array_equal(written(model, folder=tmp_path), whole)
    assert len(calls) == 1  # windows 0 to 3 were kept
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    # Finished windows are read, not drawn; more of them go on behind.
    np.testing.assert_array_equal(written(model, folder=tmp_path, count=6)[:5], whole)
    assert len(calls) == 1  # the last batch was whole
    assert len(written(model, folder=tmp_path, count=7)) == 7
    assert len(calls) == 2
    # Another seed, length or type is another text.
    for changes in ({"seed": 4}, {"length": 11}):
        before = len(calls)
        written(model, folder=tmp_path, **changes)
        assert len(calls) > before
    written(load_model(GOLDEN / "llama3", dtype="bfloat16"), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_is_named(model, tmp_path):
    written(model, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    raw = file.read_bytes()
    for bad in (raw[:-3], b"", raw.replace(b"tokens", b"others")):
        file.write_bytes(bad)
        with pytest.raises(TurboqError, match=rf"{file.name} is damaged .*: remove it"):
            written(model, folder=tmp_path)
    file.write_bytes(raw.replace(b"I32", b"F32"))
    with pytest.raises(TurboqError, match=r"holds float32\(6, 12\): remove it"):
        written(model, folder=tmp_path)


def test_a_text_of_its_own_among_others(model, tmp_path):
    (tmp_path / "t").write_text("In the beginning was the word, and more words came after. " * 9)
    sources = [str(tmp_path / "t"), "self:3"]
    mixed = mixed_windows(
        sources, model.tokenizer, length=12, count=5, model=model, folder=tmp_path, progress=False
    )
    assert mixed.text.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(
        mixed.tokens[1::2], written(model, count=2, batch=self_text.BATCH)
    )
    assert mixed.texts[1] == text_source(model, 3)
    assert (mixed.texts[1].name, mixed.bos) == ("self:3", False)
    names = {text_source(m, s).sha256 for m in (model, golden("qwen3")) for s in (3, 4)}
    assert len(names) == 4
    alone = mixed_windows(
        ["self:3"], model.tokenizer, length=12, count=2, model=model, progress=False
    )
    assert (alone.bos, alone.available) == (True, 2)
    with pytest.raises(TurboqError, match="self:3 needs a number of windows"):
        mixed_windows(["self:3"], model.tokenizer, length=12, count=None, model=model)


def test_what_follows_the_calibrated_windows_is_held_back(model, tmp_path):
    (tmp_path / "t").write_text("In the beginning was the word, and more words came after. " * 9)
    mixed = mixed_windows(
        ["self:3", str(tmp_path / "t")], model.tokenizer, length=12, count=4, check=1,
        check_length=24, model=model, progress=False,
    )  # fmt: skip
    three = written(model, count=3, batch=self_text.BATCH)
    np.testing.assert_array_equal(mixed.tokens[::2], three[:2])
    np.testing.assert_array_equal(mixed.held_back.short[0], three[2:])
    assert (list(mixed.held_back.short), list(mixed.held_back.long)) == ([0, 1], [1])


def test_a_large_model_does_not_write_its_calibration_text(model):
    assert texts.calibration_sources(model.spec) == ("self:0", "topics:calibration")
    wide = dataclasses.replace(model.spec, vocab=texts.WRITES // model.spec.hidden + 1)
    assert texts.calibration_sources(wide) == ("topics:calibration", "source:calibration")


def test_what_a_window_begins_with():
    tokenizer = from_folder(GOLDEN / "llama3")
    for changes, start in (
        ({"bos_id": 5, "eos_ids": (6, 7)}, 5),
        ({"bos_id": None, "eos_ids": (6, 7)}, 6),
    ):
        assert start_token(type(tokenizer)(backend=tokenizer.backend, **changes)) == start
    with pytest.raises(TurboqError, match="neither a BOS nor an EOS"):
        start_token(type(tokenizer)(backend=tokenizer.backend))


def test_bad_requests_are_one_clear_line(model):
    assert seed_of("self:17") == 17
    for source in ("self:", "self:x", "self:-1", "self:1.5", f"self:{2**32}", "self:²"):
        with pytest.raises(TurboqError, match="must be a seed of 0 to 4294967295"):
            seed_of(source)
    with pytest.raises(
        TurboqError, match="windows of 257 tokens exceed the model's context of 256"
    ):
        written(model, length=257)
    for changes in ({"length": 1}, {"count": 0}, {"batch": 0}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(ValueError, match="must be"):
            written(model, **changes)
    assert len(written(model, seed=2**32 - 1, count=1)) == 1
    broken = load_model(GOLDEN / "llama3")
    broken._head = broken._head | {"norm": broken._head["norm"] * jnp.float32(np.nan)}
    with pytest.raises(TurboqError, match="self-written tokens 1 to 11 are not finite"):
        written(broken)
