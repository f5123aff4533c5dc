"""Batches of ragged prompts against one prompt at a time, which uses neither batches nor caches."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import copy_of
from plan_cases import random_fit

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, Transform, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, uniform_plan
from turboq_calibrate.cli import main as cli
from turboq_calibrate.measure import decode_cache
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.measure.generate_many import Sampling, cut, generate, nucleus
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = (1, 9, 1, 9, 9)
NEW = 4


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


def prompts_of(model):
    rng = np.random.default_rng(11)
    return [rng.integers(0, model.spec.vocab, n).astype(np.int32) for n in SIZES]


def layers_of(model, codec, **policy):
    geometry = model_geometry(model)
    plan = uniform_plan(geometry, k=codec, v=codec, policy=TokenPolicy(**policy))
    return plan.kv_layers(collect_arrays(plan, random_fit(geometry)))


# mistral: a sliding window of 6; gpt_oss: logit sinks; deepseek_v2: latent vectors; qwen3_next and
# granite_hybrid: layers that keep a state; gemma4: layers that read another's cache
@pytest.mark.parametrize(
    "family",
    ["llama3", "mistral", "gpt_oss", "deepseek_v2", "qwen3_next", "granite_hybrid", "gemma4"],
)
def test_a_batch_of_exact_caches_is_plain_generation(family):
    model = load_model(GOLDEN / family)
    prompts = prompts_of(model)
    layers = layers_of(model, Exact(dim=16, dtype="float32"))
    got = generate(model, prompts, NEW, layers=layers, batch=3, chunk=4)
    assert not any(got.stopped)
    for prompt, tokens in zip(prompts, got.tokens, strict=True):
        np.testing.assert_array_equal(tokens, greedy(model, prompt[None], NEW).tokens[0])


def test_sampling_is_by_prompt_whatever_the_batch(model):
    """Oracle: the rule in float64 NumPy on logits of one pass over the whole sequence."""
    prompts = prompts_of(model)
    layers = layers_of(model, Exact(dim=16, dtype="float32"))
    how = Sampling(temperature=1.5, top_p=0.8, seed=3)
    got = generate(model, prompts, NEW, layers=layers, sampling=how, batch=3, chunk=4)
    again = generate(model, prompts, NEW, layers=layers, sampling=how, batch=2, chunk=4)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(got.tokens[i], again.tokens[i])
        logits = np.asarray(forward(model, np.concatenate([prompt, got.tokens[i]])[None])[0])[0]
        key = jax.random.fold_in(jax.random.key(3), i)
        for step in range(NEW):
            row = logits[len(prompt) + step - 1].astype(np.float64) / 1.5
            order = np.argsort(-row)
            p = np.exp(row - row.max())
            p = p[order] / p.sum()
            kept = order[: int(np.searchsorted(np.cumsum(p), 0.8)) + 1]
            noise = jax.random.gumbel(jax.random.fold_in(key, step), row.shape, jnp.float32)
            noisy = row[kept] + np.asarray(noise, np.float64)[kept]
            assert got.tokens[i][step] == kept[noisy.argmax()]
    other = generate(
        model,
        prompts,
        NEW,
        layers=layers,
        sampling=dataclasses.replace(how, seed=4),
        batch=3,
        chunk=4,
    )
    assert any((a != b).any() for a, b in zip(got.tokens, other.tokens, strict=True))


def test_the_nucleus_is_the_fewest_tokens_that_have_the_mass():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.4, 0.3, 0.2, 0.1]]))
    masses = {0.45: [1, 2], 0.55: [2, 2], 0.8: [3, 3], 1.0: [4, 4], 1e-9: [1, 1]}
    for top_p, kept in masses.items():
        found = nucleus(logits, jnp.float32(1.0), jnp.float32(top_p))
        assert np.isfinite(found).sum(axis=1).tolist() == kept, top_p
    half = nucleus(logits, jnp.float32(0.5), jnp.float32(1.0))
    np.testing.assert_allclose(half, 2 * logits, rtol=1e-6)


CODECS = {
    "by layer": TurboQuantMSE(dim=16, bits=4),
    "one pool": Transform(dim=16, segments=((16, 4),), gain="float16"),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_quantized_batch_is_each_prompt_alone(model, name, monkeypatch):
    """Sinks, a recent window and packed pages of each sequence are its own; two programs do."""
    layers = layers_of(model, CODECS[name], sinks=2, recent=3, exact_dtype="float32")
    shapes = set()
    run_layer = decode_cache.run_layer

    def counted(spec, params, x, *rest, **options):
        shapes.add(x.shape)
        return run_layer(spec, params, x, *rest, **options)

    prompts = prompts_of(model)
    monkeypatch.setattr(decode_cache, "run_layer", counted)
    got = generate(model, prompts, NEW, layers=layers, batch=3, chunk=4)
    assert {shape[:2] for shape in shapes} == {(3, 4), (3, 1)}
    for prompt, tokens in zip(prompts, got.tokens, strict=True):
        alone = greedy(model, prompt[None], NEW, layers=layers)
        np.testing.assert_array_equal(tokens, alone.tokens[0])
    assert got.read.rate is not None
    assert got.wrote.rate is not None
    # The first chunk and the first step compile: their tokens are not counted.
    assert 0 < got.read.tokens < sum(SIZES)
    assert 0 < got.wrote.tokens < NEW * len(SIZES)


def test_what_stops_a_sequence(model):
    prompts = prompts_of(model)
    layers = layers_of(model, Exact(dim=16, dtype="float32"))
    how = {"layers": layers, "batch": 3, "chunk": 4}
    free = generate(model, prompts, NEW, **how).tokens
    end = int(free[1][2])
    got = generate(
        model, prompts, NEW, stop_ids=(end,),
        stop=lambda i, tokens: i == 3 and len(tokens) == 3, **how,
    )  # fmt: skip
    for i, (whole, tokens) in enumerate(zip(free, got.tokens, strict=True)):
        ends = [n for n, token in enumerate(whole) if token == end]
        due = ends[0] if ends else NEW
        due = min(due, 3) if i == 3 else due
        np.testing.assert_array_equal(tokens, whole[:due])
        assert got.stopped[i] == (due < NEW)
    assert len(got.tokens[1]) <= 2


def test_bad_input_is_one_line(model):
    layers = layers_of(model, Exact(dim=16))
    for prompts, message in (
        ([], "no prompt"),
        ([[1], []], "prompt 1 has no token"),
        ([[1] * 250], "prompt 0 has 250 tokens, which with 9 new ones exceed .* context of 256"),
    ):
        with pytest.raises(TurboqError, match=message):
            generate(model, prompts, 9, layers=layers)
    with pytest.raises(ValueError, match="must be 1 or more"):
        generate(model, [[1]], 0, layers=layers)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            Sampling(**wrong)


def test_the_command_chats_and_compares(tmp_path, capsys):
    """Prompts of both kinds in the chat template; what is printed is what is written."""
    folder = copy_of(tmp_path, "llama3")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    rows = [{"text": "ab"}, {"messages": [{"role": "system", "content": "s"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "answers.jsonl"
    flags = ("generate", f"--model={folder}", "--max_new_tokens=3", "--noeos")
    asked = (f"--prompts={tmp_path / 'p.jsonl'}", "--prompt=hi", "--chat", "--compare")
    codec = ("--baselines=turboquant_mse:8", f"--out={out}")
    assert cli.run([*flags, *asked, *codec]) == 0
    said = capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(x["cache"], x["prompt"]) for x in found] == [
        (name, i) for name in ("exact", "turboquant_mse 8b") for i in range(3)
    ]
    model = load_model(folder)
    for row, text in zip(found, ("<user>hi<a>", "<user>ab<a>", "<system>s<a>"), strict=False):
        ids = np.array([model.tokenizer.encode(text)])
        due = greedy(model, ids, 3).tokens[0]
        assert row["text"] == model.tokenizer.decode(due, skip_special=True)
        assert row["tokens"] == 3
        assert f"--- exact, prompt {row['prompt']}\n{row['text']}\n" in said
    assert re.search(r"^exact +\S+ \S+ +9 +", said, re.MULTILINE)
    assert re.search(r"^turboquant_mse 8b .* \d of 3$", said, re.MULTILINE)
    for wrong, message in (
        ((), "no prompt: give --prompt=TEXT or --prompts=FILE"),
        (("--prompts=a,,b",), "--prompts has an empty item"),
        ((f"--prompts={tmp_path}/*.md",), f"--prompts={tmp_path}/*.md: no file matches"),
        (("--prompt=a", "--stop="), "--stop: an empty text"),
        (("--prompt=a", "--top_p=2"), "top_p=2.0 must be above 0"),
        (
            ("--prompt=a", "--chat", f"--model={GOLDEN / 'llama3'}"),
            "the model has no chat template",
        ),
    ):
        assert cli.run([*flags, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert cut("ab\n\nc#", ["#", "\n\n"]) == "ab"
    assert cut("abc", ["x"]) == "abc"
