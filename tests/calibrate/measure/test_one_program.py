"""Greedy generation under joined plans (the default): how many programs it compiles.

Layers differ in bits, in coordinates that are stored, and in all arrays; by data alone.
"""

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plan_cases import random_fit

from turboq.cache import joint, model_cache
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Transform
from turboq.plan import collect_arrays, compose, head_plan
from turboq_calibrate.measure.decode_cache import OnePool, feed, open_cache
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import spec_geometry
from turboq_kernels import columns

LAYERS = 4
FORMS = ("before", "block:256")  # read by XLA, and (single tokens) by folded queries


@pytest.fixture(scope="module")
def model():
    """Four layers of different weights: those of two and their halves."""
    found = load_model(Path(__file__).parents[2] / "golden" / "llama3")
    assert found._layers is not None
    found.spec = dataclasses.replace(found.spec, layers=found.spec.layers[:1] * LAYERS)
    found._layers = found._layers + [jax.tree.map(lambda x: x / 2, own) for own in found._layers]
    return found


def layers_of(model, form):
    """As `turboq plan` stores them: window codes with a coded gain, two heads together."""
    geometry = spec_geometry(model.spec, "f" * 64)

    def codec(index, side, head):
        first = (8, 6 - index - head - (side == "v"))
        segments = (first, (8, 1)) if index + head < 3 else (first,)
        return Transform(
            dim=16, segments=segments, quantizer="window", states=64, gain="code", gain_bits=4
        )

    # Of no other test: its programs are not there already.
    alone = head_plan(geometry, codec, k_rope=form, policy=TokenPolicy(sinks=3))
    arrays = collect_arrays(alone, random_fit(geometry))
    for at in geometry.layers:
        rng = np.random.default_rng(at.index)
        for name, shape in joint.shapes(at.kv_heads, 2, at.k_dim, at.v_dim).items():
            turn = np.eye(shape[-1]) if name == "synthesis" else 0.0
            values = 0.05 * rng.normal(size=shape) + turn
            arrays[f"layers.{at.index}.joint.{name}"] = values.astype(np.float32)
    both = tuple(dataclasses.replace(x, joint=2) for x in alone.layers)
    plan = dataclasses.replace(alone, layers=both)
    return plan.kv_layers(compose(plan, arrays))


@pytest.fixture
def compiled(caplog):
    """Names of the programs compiled since it was last called."""

    def take() -> list[str]:
        found = (re.match(r"Compiling jit\((\S+)\) ", r.getMessage()) for r in caplog.records)
        names = [name[1] for name in found if name is not None]
        caplog.clear()
        return names

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield take


def tokens_of(model, batch, count):
    rng = np.random.default_rng(count)
    return rng.integers(0, model.spec.vocab, (batch, count)).astype(np.int32)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_compiles_one_layer_and_no_other_token_anything(model, form, compiled):
    cache = open_cache(layers_of(model, form), batch=5, capacity=9)
    assert isinstance(cache, OnePool)
    assert compiled()  # what is counted is seen
    for at in range(4):
        feed(model, cache, jnp.asarray(tokens_of(model, 5, 1)), at)
        names = compiled()
        assert names.count("layer") == (at == 0)
        assert at == 0 or names == []


def test_a_prompt_adds_one(model, compiled):
    """Also to a cache that has tokens; longer generation adds none."""
    layers, prompt = layers_of(model, "before"), tokens_of(model, 3, 7)
    greedy(model, prompt, 2, layers=layers)
    assert compiled().count("layer") == 2
    greedy(model, prompt, 12, layers=layers)
    assert compiled().count("layer") == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 6])
def test_writing_and_attending_are_a_program_each(model, form, count):
    """As an engine calls them, layer by layer."""
    spec, made = model.spec.layers[0], model_cache.forms(layers_of(model, form))
    assert made is not None
    assert made.pool_of == (0,) * LAYERS
    states, (words,) = model_cache.init(made, batch=2, capacity=20)
    matrices = [columns.prepare(state, words) for state in states]
    attend = functools.partial(columns.attend, scale=spec.scale)
    programs: list[Any] = [jax.jit(columns.write), jax.jit(attend)]
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, count, heads, 16)), jnp.float32)
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    )
    before = [program._cache_size() for program in programs]
    for first in (0, count):
        at = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32), (2, count))
        for i in range(LAYERS):
            states[i], words, tail = programs[0](states[i], words, k, v)
            programs[1](q, states[i], words, tail, matrices[i], q_positions=at)
            assert [program._cache_size() for program in programs] == [n + 1 for n in before]
