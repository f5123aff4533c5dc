"""Known sizes of caches, exactly; the two views; prefix sharing."""

import numpy as np
import pytest

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, Ggml, TurboQuantMSE, VLLMTurboQuantKey, VLLMTurboQuantValue
from turboq.codecs.ggml_blocks import TYPES
from turboq.errors import TurboqError
from turboq.what_fits import (
    CacheGeometry,
    CacheLayer,
    Formula,
    LayerSize,
    Ours,
    baseline,
    differences,
    formula,
    head_bits,
    of_codecs,
    of_formats,
)
from turboq.what_fits.geometries import geometry
from turboq.what_fits.storage import kv_layers

GIB = 2**30
K32 = 32768


def stored(name: str, k: str = "f16", v: str | None = None) -> Formula:
    return formula(geometry(name), head_bits(k, v or k))


def gemma_like() -> CacheGeometry:
    """50 sliding layers of window 1024 and 10 full ones, 8 KV heads of 128."""
    sliding = CacheLayer(kind="sliding", kv_heads=8, k_dim=128, v_dim=128, window=1024)
    full = CacheLayer(kind="full", kv_heads=8, k_dim=128, v_dim=128)
    return CacheGeometry(name="like", family="like", layers=((sliding,) * 5 + (full,)) * 10)


@pytest.mark.parametrize(
    ("name", "context", "per_token", "gib"),
    [
        ("llama-3-8b", K32, 131072, 4.0),
        ("qwen2.5-32b", K32, 262144, 8.0),
        ("60x4x128", 131072, 122880, 15.0),
        ("qwen3.5-4b", K32, 8 * 4 * 256 * 2 * 2, 1.0),
        ("llama-3-70b", 131072, 327680, 40.0),
        ("mistral-7b", K32, 131072, 4.0),
        ("deepseek-v3", K32, 61 * (512 + 64) * 2, 61 * 576 * 2 * K32 / GIB),
    ],
)
def test_known_sizes_in_16_bits(name, context, per_token, gib):
    cache = stored(name)
    assert cache.bits_per_token == 8 * per_token
    assert cache.kv_bytes(context) == gib * GIB
    assert baseline(geometry(name).layers, context) == gib * GIB


@pytest.mark.parametrize(
    ("k", "v", "gib"),
    [
        ("q8_0", "q8_0", 2.125),
        ("q4_0", "q4_0", 1.125),
        ("q8_0", "q4_0", 1.625),
        ("fp8", "fp8", 2.0),
    ],
)
def test_block_scales_are_counted(k, v, gib):
    # 4 GiB * 8.5 / 16 and 4.5 / 16: not the 2 and 1 that tables without scales have.
    assert stored("llama-3-8b", k, v).kv_bytes(K32) == gib * GIB


def test_windows_cap_what_sliding_layers_keep():
    cache = formula(gemma_like(), head_bits("f16", "f16"))
    layer = 8 * (128 + 128) * 2
    assert cache.kv_bytes(1) == 60 * layer
    assert cache.kv_bytes(1024) == 60 * layer * 1024
    assert cache.kv_bytes(K32) == layer * (10 * K32 + 50 * 1024)
    assert cache.growing_bits == 8 * 10 * layer
    assert baseline(gemma_like().layers, K32) == cache.kv_bytes(K32)
    # Gemma 4 31B is of this kind: 10 full layers of 4 heads of 512, 50 sliding of 16 of 256.
    assert stored("gemma-4-31b").kv_bytes(K32) == 81920 * K32 + 819200 * 1024 == 3.28125 * GIB
    assert stored("gpt-oss-20b").kv_bytes(K32) == 12 * 2048 * (K32 + 128)


def test_engine_inputs_round_up():
    layers = (LayerSize(kind="full", bits=16), LayerSize(kind="sliding", bits=16, window=100))
    assert Formula(layers=layers).kv_bytes(1000) == 2 * (1000 + 100)
    assert Formula(layers=layers, page_tokens=16).kv_bytes(1000) == 2 * (1008 + 112)
    assert Formula(layers=layers, window_slack=512).kv_bytes(1000) == 2 * (1000 + 612)
    assert Formula(layers=layers, window_slack=512).kv_bytes(300) == 2 * (300 + 300)
    assert Formula(layers=(LayerSize(kind="full", bits=3),)).kv_bytes(3) == 2


@pytest.mark.parametrize("bad", [{"page_tokens": 0}, {"window_slack": -1}])
def test_formula_refuses(bad):
    with pytest.raises(ValueError, match="must be"):
        Formula(layers=(), **bad)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["f16", *TYPES])
def test_llama_cpp_formats_are_the_byte_exact_codecs(name, dim):
    assert head_bits(name, name)(dim, dim) == 2 * Ggml(dim=dim, type=name).bits_per_vector


# vLLM 0.33: bytes of a slot for D = 64, 96, 128, 192, 256.
SLOTS = {
    "turboquant_k8v4": (100, 148, 196, 292, 388),
    "turboquant_4bit_nc": (70, 102, 134, 198, 262),
    "turboquant_k3v4_nc": (62, 90, 118, 174, 230),
    "turboquant_3bit_nc": (54, 78, 102, 150, 198),
    "int8_per_token_head": (136, 200, 264, 392, 520),
    "int4_per_token_head": (72, 104, 136, 200, 264),
    "nvfp4": (72, 108, 144, 216, 288),
    "fp8": (128, 192, 256, 384, 512),
}


@pytest.mark.parametrize("name", SLOTS)
def test_vllm_slots(name):
    bits = head_bits(name, name)
    assert tuple(bits(d, d) // 8 for d in (64, 96, 128, 192, 256)) == SLOTS[name]


def test_vllm_presets_keep_the_edge_layers_of_dense_models_in_16_bits():
    dense = of_formats(geometry("llama-3-8b"), "turboquant_k8v4", "turboquant_k8v4").engine
    assert dense.bits_per_token == 8 * (28 * 8 * 196 + 4 * 8 * 512)
    assert [layer.bits for layer in dense.layers[:3]] == [8 * 8 * b for b in (512, 512, 196)]
    hybrid = of_formats(geometry("qwen3.5-4b"), "turboquant_4bit_nc", "turboquant_4bit_nc").engine
    assert hybrid.bits_per_token == 8 * 8 * 4 * 262


@pytest.mark.parametrize("preset", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_vllm_presets_are_our_codecs(preset):
    bits = int(preset[11])
    ours = [c(dim=128, bits=bits).bits_per_vector for c in (VLLMTurboQuantKey, VLLMTurboQuantValue)]
    assert head_bits(preset, preset)(128, 128) == sum(ours)


@pytest.mark.parametrize(
    ("k", "v", "dims", "words"),
    [
        ("q9_0", "f16", (128, 128), "unknown cache format 'q9_0' .did you mean"),
        ("q4_0", "q4_0", (80, 80), "80 numbers is not whole blocks of 32"),
        ("turboquant_k8v4", "q8_0", (128, 128), "a vLLM preset stores both"),
        ("turboquant_k8v4", "turboquant_k8v4", (576, 0), "no slot for a latent vector"),
    ],
)
def test_formats_that_do_not_exist(k, v, dims, words):
    with pytest.raises(TurboqError, match=words):
        head_bits(k, v)(*dims)


POLICIES = [TokenPolicy(), TokenPolicy(sinks=4, recent=100)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_our_view_is_what_accounting_counts(policy, batch):
    shape = geometry("3x2x64")
    layers = kv_layers(shape, lambda side, dim: TurboQuantMSE(dim=dim, bits=3), policy)
    for context in (1, 256, 257, 5000):
        at = accounting.residency(layers, context=context, batch=batch)
        ours = Ours.of(layers)
        assert ours.kv_bytes(context, batch) == at.cache
        assert ours.fixed_bytes == at.arrays + at.tables


def test_views_agree_on_whole_pages_and_the_rest_is_explained():
    storage = of_codecs(geometry("3x2x64"), lambda side, dim: Exact(dim=dim))
    assert storage.engine.kv_bytes(512, 2) == storage.ours.kv_bytes(512, 2)
    shape, policy = gemma_like(), TokenPolicy(sinks=4, recent=64)
    storage = of_codecs(shape, lambda side, dim: TurboQuantMSE(dim=dim, bits=2), policy)
    for context in (700, 5000):
        why = differences(storage.engine, storage.ours, context=context, batch=3)
        engine, ours = (view.kv_bytes(context, 3) for view in (storage.engine, storage.ours))
        assert sum(why.values()) == ours - engine
        assert all(extra >= 0 for extra in why.values())
    token = 2 * 8 * (128 * 2 + 16) // 8  # K and V of 8 heads: 2-bit codes and a scale, one layer
    # A window of 1024 tokens touches five pages at most.
    rest = 10 * (5120 - 5000) + 50 * (5 * 256 - 1024)
    assert why["rest of pages of 256 tokens"] == 3 * token * rest
    assert why["exact sinks and recent window"] == 3 * 60 * 8 * 2 * 128 * 2 * (4 + 64)


def test_formats_have_a_cache_of_ours_where_a_codec_exists():
    storage = of_formats(geometry("llama-3-8b"), "q8_0", "f16")
    assert storage.ours.kv_bytes(K32) == storage.engine.kv_bytes(K32) == 3.0625 * GIB
    with pytest.raises(TurboqError, match="no codec for int8"):
        _ = of_formats(geometry("llama-3-8b"), "int8", "int8").ours
    with pytest.raises(TurboqError, match="one latent vector per token"):
        _ = of_formats(geometry("deepseek-v3"), "f16", "f16").ours


def counted(layers, page: int, context: int, batch: int, prefix: int) -> int:
    """Bytes by listing every page that any session needs, a shared page once."""
    pages = set()
    for index, (bits, window) in enumerate(layers):
        first = 0 if window is None else max(0, context - window)
        shared = max(0, prefix - first) // page if batch > 1 else 0
        private = -(-(context - first - shared * page) // page)
        for session in range(batch):
            pages |= {(index, bits, "shared", p) for p in range(shared)}
            pages |= {(index, bits, session, p) for p in range(private)}
    return sum(bits for _, bits, *_ in pages) * page // 8


def test_prefix_sharing_against_counting_pages():
    rng = np.random.default_rng(6)
    for _ in range(200):
        layers = [(8, None), (16, int(rng.integers(1, 300)))]
        page, batch = int(rng.choice([1, 4, 16])), int(rng.integers(1, 6))
        context = int(rng.integers(1, 600))
        prefix = int(rng.integers(0, context + 1))
        sizes = tuple(LayerSize(kind="x", bits=b, window=w) for b, w in layers)
        found = Formula(layers=sizes, page_tokens=page).kv_bytes(context, batch, prefix)
        assert found == counted(layers, page, context, batch, prefix)


def test_prefix_sharing_known_numbers():
    cache = stored("llama-3-8b")
    # 8 sessions of 32k with 24k in common: 24k once and 8 times 8k.
    assert cache.kv_bytes(K32, 8, 24576) == 131072 * (24576 + 8 * 8192)
    assert cache.kv_bytes(K32, 1, 24576) == 131072 * K32
    ours = Ours(page_bytes=10, exact_bytes=3, fixed_bytes=0)
    assert ours.kv_bytes(1000, 4, 700) == 10 * (2 + 4 * 2) + 4 * 3
