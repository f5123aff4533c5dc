"""What llama.cpp caches for an architecture beyond what the header's plain fields say.

Expected bytes (16 bits) are products written out: layers x KV heads x (K + V) x 2 x tokens.
"""

import pytest

from turboq.errors import TurboqError
from turboq.what_fits import CacheGeometry, formula, from_metadata, head_bits

F16 = head_bits("f16", "f16")
GIB = 2**30
K128 = 131072


def header(arch: str, layers: int, heads: int, kv, hidden: int, **fields) -> dict:
    """Metadata of an architecture; `a__b` stands for a.b."""
    own = {
        "block_count": layers, "context_length": K128, "embedding_length": hidden,
        "attention.head_count": heads, "attention.head_count_kv": kv,
    } | {key.replace("__", "."): value for key, value in fields.items()}  # fmt: skip
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in own.items()}


def read(*args, **fields) -> CacheGeometry:
    return from_metadata(header(*args, **fields), "x")


def kept(*args, **fields) -> int:
    """Bytes at 131,072 tokens."""
    return formula(read(*args, **fields), F16).kv_bytes(K128)


DEEPSEEK = {
    "attention__kv_lora_rank": 512, "rope__dimension_count": 64, "attention__key_length": 192,
    "attention__value_length": 128,
}  # fmt: skip


def test_latent_attention_without_its_lengths_is_cached_whole():
    """DeepSeek-V2-Lite: 16 heads of 192 + 128 in every one of 27 layers, or 512 + 64 numbers."""
    assert kept("deepseek2", 27, 16, 16, 2048, **DEEPSEEK) == 27 * 16 * (192 + 128) * 2 * K128
    assert kept("deepseek2", 27, 16, 16, 2048, **DEEPSEEK) == 33.75 * GIB
    assert "K and V whole" in read("deepseek2", 27, 16, 16, 2048, **DEEPSEEK).note
    later = DEEPSEEK | {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    assert kept("deepseek2", 27, 16, 1, 2048, **later) == 27 * (512 + 64) * 2 * K128
    # MiniCPM3 names no value length: hidden / heads, not the key length.
    small = {"attention__kv_lora_rank": 256, "rope__dimension_count": 32}
    found = kept("minicpm3", 62, 40, 40, 2560, **small, attention__key_length=96)
    assert found == 62 * 40 * (96 + 64) * 2 * K128


def test_index_keys():
    own = DEEPSEEK | {"attention__key_length_mla": 192, "attention__indexer__key_length": 128}
    own |= {"attention__indexer__head_count": 64, "attention__indexer__top_k": 2048}
    assert kept("deepseek32", 61, 128, 1, 7168, **own) == 61 * (576 + 128) * 2 * K128
    with pytest.raises(TurboqError, match=r"indexer.key_length=128 is not understood and adds"):
        kept("deepseek2", 61, 128, 1, 7168, **own)


def test_llama_4_has_its_chunks_built_in():
    """Scout: every fourth of 48 layers keeps all, the others 8,192 tokens; 8 KV heads of 128."""
    scout = ("llama4", 48, 40, 8, 5120)
    expected = 8 * (128 + 128) * 2 * (12 * K128 + 36 * 8192)
    assert kept(*scout) == expected == 7.125 * GIB
    assert kept(*scout, attention__sliding_window=77) == expected  # llama.cpp has the number fixed
    assert kept(*scout, attention__sliding_window=0) == 48 * 8 * 256 * 2 * K128


ROW = 2 * (32 + 32) * 2  # bytes of a token in a layer of 2 KV heads of 32
WINDOWS = {
    # architecture, layers, fields -> windows of its first layers
    "gemma2 without a window key": ("gemma2", 4, {}, [4096, None, 4096, None]),
    "gemma2": ("gemma2", 3, {"attention__sliding_window": 64}, [64, None, 64]),
    "exaone4 of 64 layers": ("exaone4", 64, {}, [4096, 4096, 4096, None]),
    "exaone4 of 30 layers has none": (
        "exaone4", 30, {"attention__sliding_window": 64}, [None] * 4,
    ),
    "phi3 ignores its window": ("phi3", 4, {"attention__sliding_window": 64}, [None] * 4),
    "olmo 3": ("olmo2", 4, {"attention__sliding_window": 64}, [64, 64, 64, None]),
    "olmo 2": ("olmo2", 4, {}, [None] * 4),
    "smallthinker": (
        "smallthinker", 4, {"attention__sliding_window": 64}, [None, 4096, 4096, 4096],
    ),
    "a period of the header": (
        "gemma3", 4, {"attention__sliding_window": 64, "attention__sliding_window_pattern": 2},
        [64, None, 64, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    arch, layers, fields, expected = WINDOWS[name]
    found = read(arch, layers, 4, 2, 128, **fields).layers
    assert [x.window for x in found[: len(expected)]] == expected
    assert len(found) == layers


def test_layers_that_predict_further_tokens_keep_nothing():
    """GLM-4.5-Air: block_count is 47, of which 46 run."""
    assert kept("glm4moe", 47, 96, 8, 4096, attention__key_length=128, attention__value_length=128,
                nextn_predict_layers=1) == 46 * 8 * 256 * 2 * K128  # fmt: skip
    hybrid = read("qwen35", 9, 4, 2, 128, nextn_predict_layers=1, full_attention_interval=4)
    assert [x.kind for x in hybrid.layers] == (["none"] * 3 + ["full"]) * 2
    with pytest.raises(TurboqError, match=r"nextn_predict_layers=9 must be .* 0..8"):
        read("glm4moe", 9, 4, 2, 128, nextn_predict_layers=9)


def test_gemma_3n_shares_all_but_its_first_20_layers():
    found = read("gemma3n", 35, 4, 2, 128, attention__sliding_window=64).layers
    assert [x.kind for x in found].count("shared") == 15
    said = read("gemma3n", 35, 4, 2, 128, attention__sliding_window=64,
                attention__shared_kv_layers=10).layers  # fmt: skip
    assert [x.kind for x in said].count("shared") == 10


SSM = {"ssm__conv_kernel": 4, "ssm__inner_size": 3072, "ssm__state_size": 128}


def test_states():
    """float32: inner x state, and 3 tokens of inner + 2 x groups x state channels."""
    granite = read("granitehybrid", 40, 12, [0] * 9 + [4] + [0] * 30, 1536, **SSM,
                   ssm__group_count=1)  # fmt: skip
    assert granite.state_bytes == 39 * 4 * (3072 * 128 + 3 * (3072 + 2 * 128))
    qwen = read("qwen35", 4, 4, 2, 128, ssm__conv_kernel=4, ssm__inner_size=32 * 128,
                ssm__state_size=128, ssm__group_count=16)  # fmt: skip
    assert qwen.state_bytes == 3 * 4 * (32 * 128 * 128 + 3 * (32 * 128 + 2 * 16 * 128))
    jamba = read("jamba", 2, 4, [0, 2], 128, **SSM)  # Mamba 1: no groups
    assert jamba.state_bytes == 4 * (3072 * 128 + 3 * 3072)
    falcon = read("falcon-h1", 2, 4, 2, 128, **SSM, ssm__group_count=1)
    assert [x.kind for x in falcon.layers] == ["full"] * 2
    assert falcon.state_bytes == 2 * 4 * (3072 * 128 + 3 * (3072 + 2 * 128))
    lfm = read("lfm2", 3, 4, [0, 2, 0], 128, shortconv__l_cache=3)
    assert lfm.state_bytes == 2 * 4 * 128 * 2
    mlp = read("nemotron_h", 4, 4, [0, 0, 2, 0], 128, **SSM, ssm__group_count=8,
               feed_forward_length=[0, 512, 0, 512])  # fmt: skip
    assert mlp.state_bytes == 4 * (3072 * 128 + 3 * (3072 + 2 * 8 * 128))
    own = DEEPSEEK | {"attention__key_length_mla": 192, "kda__head_dim": 128, "ssm__conv_kernel": 4}
    kimi = read("kimi-linear", 4, 32, [0, 0, 0, 32], 2304, **own)
    assert [x.kind for x in kimi.layers] == ["none"] * 3 + ["latent"]
    assert kimi.state_bytes == 3 * 4 * (32 * 128 * 128 + 3 * 3 * 32 * 128)


def test_a_state_that_is_not_known():
    found = read("newhybrid", 2, 4, [0, 2], 128)
    assert (found.state_bytes, found.unknown_states) == (0, 1)
    assert read("deci", 2, 4, [0, 2], 128).unknown_states == 0  # its empty layers keep nothing


def test_listed_recurrent_layers():
    found = read("qwen35", 3, 4, 2, 128, attention__recurrent_layers=[True, False, True]).layers
    assert [x.kind for x in found] == ["none", "full", "none"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention__kv_magic": 3}, r"new.attention.kv_magic=3 is not understood and may change"),
        ({"attention__compress_ratio": 4}, "compress_ratio=4 is not understood"),
        ({"cross__layers": [3]}, r"cross.layers=.3. is not understood"),
        ({"full_attention_interval": 4}, "full_attention_interval=4 is not understood"),
        ({"decoder_block_count": 4}, "decoder_block_count=4 is not understood"),
        ({"attention__sliding_window": 64}, "sliding_window=64 without .*pattern is not"),
        ({"attention__kvheads": 2}, "attention.kvheads=2 is not understood"),
        ({"attention__d_v": 2}, "attention.d_v=2 is not understood"),
        ({"yoco": 1}, "yoco=1 is not understood"),
        ({"ssm__state_size": 128}, "ssm.state_size=128 may change the cache, and is not"),
        ({"kda__head_dim": 64}, "kda.head_dim=64 may change the cache, and is not"),
        ({"shortconv__l_cache": 3}, "shortconv.l_cache=3 may change the cache, and is not"),
        ({"attention__key_length_swa": 16}, "key_length_swa=16 may change the cache, and is"),
        ({"attention__sliding_window_pattern": [1, 0, 1]}, "pattern=.1, 0, 1. may change the"),
        ({"attention__shared_kv_layers": 1}, "shared_kv_layers=1 may change the cache, and"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(fields, words):
    usual = {"expert_group_count": 8, "attention__layer_norm_rms_epsilon": 1e-6, "kv_off": 0}
    assert kept("new", 3, 4, 2, 128, **usual) == 3 * ROW * K128
    with pytest.raises(TurboqError, match=words):
        read("new", 3, 4, 2, 128, **usual, **fields)


def test_encoders_keep_no_cache():
    with pytest.raises(TurboqError, match=r"architecture 'nomic-bert' .* keeps no KV cache"):
        read("nomic-bert", 12, 12, 12, 768)
    with pytest.raises(TurboqError, match=r"architecture 't5' is an encoder with a decoder"):
        read("t5", 12, 12, 12, 768)
