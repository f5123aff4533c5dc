"""The longest context: published closed forms, and the definition itself."""

import pytest

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.what_fits.max_context import max_context

GIB = 2**30


def model(layers: int, heads: int, codec, policy: TokenPolicy | None = None):
    policy = policy or TokenPolicy()
    layer = uniform_layer(kv_heads=heads, k=codec, v=codec, policy=policy)
    return (layer,) * layers


@pytest.mark.parametrize(
    ("layers", "heads", "gib", "tokens"),
    [
        (32, 8, 4, 32768),  # Llama-3-8B: 128 KiB per token in 16 bits
        (64, 8, 8, 32768),  # Qwen2.5-32B: 256 KiB
        (60, 4, 15, 131072),  # 60 layers of 4 KV heads: 122,880 bytes
    ],
)
def test_known_sizes_in_16_bits(layers, heads, gib, tokens):
    found = model(layers, heads, Exact(dim=128, dtype="float16"))
    assert max_context(found, nbytes=gib * GIB) == tokens
    assert max_context(found, nbytes=gib * GIB - 1) == tokens - 256
    assert max_context(found, nbytes=gib * GIB, batch=2) == tokens // 2


@pytest.mark.parametrize(
    "codec", [TurboQuantMSE(dim=64, bits=3), PerHead(dim=64, bits=2, scale="head")]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_is_the_longest_that_fits(codec, batch):
    layers = model(2, 3, codec, TokenPolicy(sinks=4, recent=32))
    for nbytes in (100_000, 1_000_003, 12_345_678):
        longest = max_context(layers, nbytes=nbytes, batch=batch)
        if longest:
            assert accounting.residency(layers, context=longest, batch=batch).total <= nbytes
        one_more = accounting.residency(layers, context=longest + 1, batch=batch).total
        assert one_more > nbytes


def test_too_small_a_memory_holds_nothing():
    assert max_context(model(1, 1, TurboQuantMSE(dim=64, bits=3)), nbytes=0) == 0


@pytest.mark.parametrize("bad", [{"nbytes": -1}, {"nbytes": 1, "batch": 0}])
def test_refuses(bad):
    with pytest.raises(ValueError, match="must be"):
        max_context(model(1, 1, Exact(dim=64)), **bad)
