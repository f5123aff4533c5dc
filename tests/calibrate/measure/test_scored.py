"""From where positions are scored, and how many tokens are quantized there, by brute force."""

import pytest

from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import Exact, KiviKey, TurboQuantMSE
from turboq.errors import TurboqError
from turboq_calibrate.measure.scored import Scored, scored


def brute_force(window, layer, length):
    """Scored positions and quantized tokens, one query and one token at a time."""
    policy, positions, tokens = layer.policy, [], set()
    for t in range(length - 1):
        stored = max(t + 1 - policy.recent, 0) // layer.block * layer.block
        seen = {
            s for s in range(t + 1)
            if policy.sinks <= s < stored and (window is None or s > t - window)
        }  # fmt: skip
        tokens |= seen
        if seen:
            positions.append(t)
    return positions, tokens


@pytest.mark.parametrize(
    "codec", [TurboQuantMSE(dim=32, bits=3), KiviKey(dim=32, bits=2, group=32)]
)
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("window", [None, 4, 40])
def test_scored_against_brute_force(codec, sinks, recent, window):
    policy = TokenPolicy(sinks=sinks, recent=recent)
    full = uniform_layer(kv_heads=2, k=codec, v=TurboQuantMSE(dim=32, bits=3), policy=policy)
    exact = uniform_layer(kv_heads=2, k=Exact(dim=32), v=Exact(dim=32), policy=policy)
    positions, tokens = brute_force(window, full, 81)
    if not positions:
        with pytest.raises(TurboqError, match=f"{sinks} sinks and {recent} recent"):
            scored([window], [full], 81)
        return
    assert scored([window], [full], 81) == Scored(first=positions[0], quantized=len(tokens))
    # A layer of exact heads adds nothing; a layer without a window sees earlier and more.
    assert scored([None, window], [exact, full], 81).quantized == len(tokens)
    both = scored([window, None], [full, full], 81)
    everything = brute_force(None, full, 81)
    assert both == Scored(first=everything[0][0], quantized=len(everything[1]))
    exact_policy = scored([None], [exact], 81)
    assert exact_policy == Scored(first=sinks + recent, quantized=0)
