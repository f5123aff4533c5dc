"""How strongly a basis is pulled towards something safe: what texts left out say."""

import numpy as np
import pytest

from turboq.codecs.fit_transform import TransformOptions, fit_heads, held_out_cost
from turboq.codecs.observed import Observed, subset
from turboq_calibrate.fit import guard as g

DIM, TOKENS, BITS = 16, 400, 4.0
OPTIONS = TransformOptions()
SPREAD = np.repeat([2.0, 0.5], DIM // 2)


def two_texts(rng, spreads, *, heads=1):
    """Tokens of texts whose channels spread by `spreads` [X, D], gradients alike."""
    parts = [rng.normal(size=(heads, TOKENS, DIM)) * spread for spread in spreads]
    x = np.concatenate(parts, axis=1).astype(np.float32)
    text = np.repeat(np.arange(len(spreads), dtype=np.int32), TOKENS)
    return Observed.of(x, rng.normal(size=x.shape).astype(np.float32), text=text)


def leave_one_out(seen, strength):
    """The sum that the guard minimises, written out."""
    own = TransformOptions(shrink=strength)
    return sum(
        held_out_cost(
            fit_heads(subset(seen, seen.text != t), own), subset(seen, seen.text == t), BITS, own
        )
        for t in np.unique(seen.text)
    )


def test_texts_unlike_each_other_are_guarded_against(rng):
    """Where one text spreads little the other does: levels fitted to it alone would clip."""
    seen = two_texts(rng, [SPREAD, SPREAD[::-1]])
    found = g.guard(lambda layer, side: seen, [0], OPTIONS, BITS)
    assert found.options.shrink >= 0.4
    assert list(found.held_out) == list(g.SHRINK)
    for strength, cost in found.held_out.items():
        assert cost == pytest.approx(2 * leave_one_out(seen, strength), rel=1e-6)  # K and V
    assert found.held_out[0.0] > 1.5 * min(found.held_out.values())


def test_texts_alike_need_no_guard(rng):
    seen = two_texts(rng, [SPREAD, SPREAD])
    found = g.guard(lambda layer, side: seen, [0], OPTIONS, BITS)
    assert found.options == OPTIONS
    assert min(found.held_out, key=lambda s: found.held_out[s]) == 0.0


def test_the_strongest_about_as_good_wins(rng, monkeypatch):
    costs = {0.0: 1.0, 0.2: 1.04, 0.4: 1.049, 0.6: 1.06}
    monkeypatch.setattr(g, "held_out_cost", lambda fits, seen, bits, own: costs[own.shrink])
    seen = two_texts(rng, [np.ones(DIM)] * 2)
    assert g.guard(lambda layer, side: seen, [0], OPTIONS, BITS).options.shrink == 0.4


def test_one_text_leaves_the_options_alone(rng):
    seen = two_texts(rng, [np.ones(DIM)])
    options = TransformOptions(shrink=0.3)
    found = g.guard(lambda layer, side: seen, [0, 1], options, BITS)
    assert found == g.Guarded(options=options, held_out={})


def test_a_few_layers_and_tokens_are_tried(rng, monkeypatch):
    asked, sizes = [], set()
    seen = two_texts(rng, [np.ones(DIM)] * 2)

    def observed(layer, side):
        asked.append((layer, side))
        return seen

    def cost(fits, left_out, bits, own):
        sizes.add(left_out.x.shape[1])
        return 1.0

    monkeypatch.setattr(g, "held_out_cost", cost)
    monkeypatch.setattr(g, "TOKENS", 100)
    g.guard(observed, list(range(3, 27)), OPTIONS, BITS)
    assert asked == [(layer, side) for layer in (3, 7, 11, 15, 19, 23) for side in ("k", "v")]
    assert sizes == {100}
