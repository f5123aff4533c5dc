"""What each engine is told, and how plans that it does not have are rounded."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from plan_cases import geometry, random_fit

from turboq.codecs import (
    FP8,
    NVFP4,
    Codec,
    Exact,
    Ggml,
    Int8TokenHead,
    KiviKey,
    KiviValue,
    PerChannel,
    TurboQuantMSE,
)
from turboq.codecs.ggml import mainline
from turboq.codecs.vllm_turboquant import preset, slot_bytes
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, sglang, vllm_rules
from turboq.export.report import make_report
from turboq.plan import collect_arrays, head_plan, uniform_plan
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

D = 64
MODEL = geometry(layers=6, kv_heads=2, k_dim=D, v_dim=D)
CHECKPOINT = Path(__file__).resolve().parents[2] / "golden" / "llama3"
EXACT = Exact(dim=D)


def pair(k, v=None, model=MODEL):
    """A plan of one codec, or of a function (layer, side, head) -> codec, with random arrays."""
    if isinstance(k, Codec):
        plan = uniform_plan(model, k=k, v=v or k)
    else:
        plan = head_plan(model, k)
    return plan, collect_arrays(plan, random_fit(model))


def run(name, k, v=None, *, model=MODEL, arrays=None, **options):
    """(projection, report) of one engine."""
    plan, fitted = pair(k, v, model)
    arrays = fitted | (arrays or {})
    found = ENGINES[name].project(plan, arrays, Options(**options))
    return found, make_report(plan, arrays, ENGINES[name], found, list(found.files))


def test_llama_cpp_takes_one_type_per_side_and_rotates():
    found, report = run("llama.cpp", mainline(D, "k", "q8_0"), mainline(D, "v", "q4_0"))
    assert report.status == "exact"
    assert found.flags == ("llama-server -m MODEL.gguf -ctk q8_0 -ctv q4_0 -fa on",)
    assert found.env == {}
    assert "q8_0-q4_0" in found.notes[1]


@pytest.mark.parametrize("name", ["llama.cpp", "ollama", "lmstudio", "turboquant-llama.cpp"])
def test_no_line_turns_the_stock_rotation_off(name):
    """A plan without a rotation is counted as the engine stores it: rotated, so approximated."""
    found, report = run(name, Ggml(dim=D, type="q8_0"))
    assert "ROT_DISABLE" not in " ".join([*found.flags, *found.env])
    assert report.status == "approximated"
    turned, report = run(name, mainline(D, "k", "q8_0"), mainline(D, "v", "q8_0"))
    assert report.status == "exact"
    assert turned.flags == found.flags


def test_llama_cpp_never_takes_fewer_bits_unless_asked_for_size():
    def choose(layer, side, head):
        return TurboQuantMSE(dim=D, bits=5 if (layer, side, head) == (3, "k", 1) else 4)

    assert "-ctk q5_0 -ctv q4_0" in run("llama.cpp", choose)[0].flags[0]
    found, report = run("llama.cpp", TurboQuantMSE(dim=D, bits=5), prefer="size")
    assert "-ctk q4_1 -ctv q4_1" in found.flags[0]
    assert report.engine_bytes_per_token <= report.plan_bytes_per_token


def test_size_is_within_the_bytes_of_the_whole_plan():
    """6.25 and 3.25 bits: no type has 3.25, so K must leave what V's smallest takes more."""
    plan = TurboQuantMSE(dim=D, bits=6), TurboQuantMSE(dim=D, bits=3)
    for name in ("llama.cpp", "ik_llama.cpp"):
        found, report = run(name, *plan, prefer="size")
        assert "-ctk q4_1 -ctv q4_0" in found.flags[0]  # 5 + 4.5 bits
        assert report.engine_bytes_per_token == report.plan_bytes_per_token
        assert "-ctk q4_1" not in run(name, *plan)[0].flags[0]


def rotation_in(model):
    """The rotation of quantized keys that llama.cpp applies to a model."""
    return ENGINES["llama.cpp"].formats(model, Options())["q8_0"][0].config()["rotation"]


def test_llama_cpp_does_not_rotate_models_of_mixed_head_dims():
    layers = list(MODEL.layers)
    layers[2] = dataclasses.replace(layers[2], k_dim=128)
    mixed = dataclasses.replace(MODEL, layers=tuple(layers))
    assert run("llama.cpp", Ggml(dim=D, type="q8_0"), model=mixed)[1].status == "exact"
    assert rotation_in(mixed) == "identity"
    # With a window the odd layer has a cache of its own, so both caches are rotated.
    layers[2] = dataclasses.replace(layers[2], window=256)
    mixed = dataclasses.replace(MODEL, layers=tuple(layers))
    assert rotation_in(mixed) == "walsh"


def test_ik_llama_has_first_and_last_layers_per_side():
    names = {0: "q8_0", 1: "q8_0", 5: "q5_0"}

    def choose(layer, side, head):
        return Ggml(dim=D, type=names.get(layer, "q4_0") if side == "k" else "q4_0")

    found, report = run("ik_llama.cpp", choose)
    assert report.status == "exact"
    assert "-ctk q4_0 -ctk-first q8_0,2 -ctk-last q5_0,1 -ctv q4_0 -fa on" in found.flags[0]

    def islands(layer, side, head):
        return TurboQuantMSE(dim=D, bits=8 if layer in (1, 4) else 4)

    report = run("ik_llama.cpp", islands)[1]
    bits = [layer.k[0].engine_bits / D for layer in report.layers]
    assert bits == [4.5, 8.5, 8.5, 8.5, 8.5, 4.5]


def test_the_fork_has_turbo_types_and_layer_patterns():
    def choose(layer, side, head):
        wide = side == "k" or layer in (0, 1, 4, 5)
        return TurboQuantMSE(dim=128, bits=8 if wide else 2)

    model = geometry(layers=6, kv_heads=2, k_dim=128, v_dim=128)
    found, report = run("turboquant-llama.cpp", choose, model=model)
    assert found.env["TURBO_LAYER_ADAPTIVE"] == "7"
    assert "-ctk q8_0 -ctv turbo2" in found.flags[0]
    # 34 bytes per block of 128 channels.
    assert report.layers[2].v[0].engine_bits == 34 * 8
    assert report.layers[0].v[0].engine == "q8_0 rotated"


def test_ollama_has_one_type_and_lm_studio_two():
    found = run("ollama", TurboQuantMSE(dim=D, bits=8), TurboQuantMSE(dim=D, bits=4))[0]
    assert found.env["OLLAMA_KV_CACHE_TYPE"] == "q8_0"
    found = run("lmstudio", mainline(D, "k", "q8_0"), mainline(D, "v", "q4_0"))[0]
    config = json.loads(found.files["lmstudio_load_config.json"])
    assert config["llamaKCacheQuantizationType"] == "q8_0"
    assert config["llamaVCacheQuantizationType"] == "q4_0"


def test_vllm_dtype_and_skipped_layers():
    def choose(layer, side, head):
        return EXACT if layer in (0, 3) else Int8TokenHead(dim=D)

    found, report = run("vllm", choose)
    assert report.status == "exact"
    assert found.flags[0].endswith(
        "--dtype bfloat16 --kv-cache-dtype int8_per_token_head --kv-cache-dtype-skip-layers 0 3"
    )
    assert report.engine_bytes_per_token == 4 * 2 * 2 * (D + 4) + 2 * 2 * 2 * 2 * D


def test_vllm_presets_skip_the_boundary_and_round_slots_up():
    # At head dim 8 a slot is 3 + 2 + 4 + 4 = 13 bytes, stored as 14.
    model = geometry(layers=6, kv_heads=2, k_dim=8, v_dim=8)
    k, v = preset("turboquant_k3v4_nc", 8)

    def choose(layer, side, head):
        return Exact(dim=8) if layer in (0, 1, 4, 5) else (k if side == "k" else v)

    found, report = run("vllm", choose, model=model)
    assert report.status == "exact"
    assert "turboquant_k3v4_nc --kv-cache-dtype-skip-layers 0 1 4 5" in found.flags[0]
    assert report.layers[2].engine_bytes == 2 * slot_bytes("turboquant_k3v4_nc", 8) == 2 * 14
    assert report.layers[0].engine_bytes == 2 * 2 * 16
    # Without exact ends vLLM leaves them out all the same: here another dtype is smaller then.
    assert vllm_rules.forced_skips(MODEL, "turboquant_k3v4_nc") == {0, 1, 4, 5}
    k, v = preset("turboquant_k3v4_nc", D)
    assert "int4_per_token_head" in run("vllm", k, v)[0].flags[0]


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ({}, "num_bits"),
        ({"num_bits": 4, "type": "float", "strategy": "tensor"}, "num_bits"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "type"),
        ({"num_bits": 8, "type": "float", "strategy": "channel"}, "strategy"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": False}, "symmetric"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True}, ""),
    ],
)
def test_what_vllm_accepts(scheme, says):
    refused = vllm_rules.why_refused(scheme)
    assert says in refused
    assert bool(refused) == bool(says)


def test_vllm_overlay_merges_into_a_checkpoint(tmp_path):
    geometry = model_geometry(load_model(str(CHECKPOINT), resident=False))
    found, report = run(
        "vllm", FP8(dim=16, scale="head"), model=geometry, checkpoint=CHECKPOINT, dtype="float16"
    )
    assert report.status == "exact"
    (tmp_path / "s").write_bytes(found.files["kv_scales.safetensors"])
    scales = safetensors.numpy.load_file(tmp_path / "s")
    assert scales["model.layers.1.self_attn.v_scale"].shape == (2, 1, 1)
    assert scales["model.layers.1.self_attn.v_scale"].dtype == np.float32
    config = json.loads(found.files["config.json"])
    scheme = config["quantization_config"]["kv_cache_scheme"]
    assert vllm_rules.why_refused(scheme) == ""
    assert scheme["strategy"] == "attn_head"
    assert config["quantization_config"]["config_groups"] == {}
    assert config["model_type"] == "llama"
    index = json.loads(found.files["model.safetensors.index.json"])["weight_map"]
    assert index["model.layers.0.self_attn.k_scale"] == "kv_scales.safetensors"
    assert index["model.embed_tokens.weight"] == "model.safetensors"


def test_vllm_scales_per_tensor_leave_skipped_layers_out(tmp_path):
    def choose(layer, side, head):
        return EXACT if layer == 2 else FP8(dim=D, scale="tensor")

    one = np.full(2, 0.25, np.float32)
    arrays = {f"layers.{i}.{s}.scale": one for i in (0, 1, 3, 4, 5) for s in "kv"}
    found, report = run("vllm", choose, arrays=arrays)
    assert report.status == "exact"
    assert "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 2" in found.flags[0]
    (tmp_path / "s").write_bytes(found.files["kv_scales.safetensors"])
    scales = safetensors.numpy.load_file(tmp_path / "s")
    assert len(scales) == 10
    assert scales["model.layers.0.self_attn.k_scale"].tolist() == [0.25]
    scheme = json.loads(found.files["quantization_config.json"])["kv_cache_scheme"]
    assert scheme["strategy"] == "tensor"


def test_checkpoints_of_other_models_are_refused(tmp_path):
    from turboq.export import export

    plan, arrays = pair(FP8(dim=D, scale="head"))
    options = Options(checkpoint=CHECKPOINT)
    with pytest.raises(TurboqError, match=r"num_hidden_layers: plan 6, checkpoint 2.*head_dim"):
        export(plan, arrays, ENGINES["vllm"], tmp_path / "out", options)
    with pytest.raises(TurboqError, match=r"config\.json"):
        export(plan, arrays, ENGINES["vllm"], tmp_path / "out", Options(checkpoint=tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_quantized_by_another_method_is_refused(tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    geometry = model_geometry(load_model(str(CHECKPOINT), resident=False))
    with pytest.raises(TurboqError, match="quantized by 'gptq'"):
        run("vllm", FP8(dim=16, scale="head"), model=geometry, checkpoint=folder)


def test_sglang_has_one_scale_for_keys_and_values():
    values = {"k": 0.5, "v": 0.25}
    arrays = {
        f"layers.{i}.{s}.scale": np.full(2, values[s], np.float32) for i in range(6) for s in "kv"
    }
    found, report = run("sglang", FP8(dim=D, scale="tensor"), arrays=arrays, tensor_parallel=2)
    document = json.loads(found.files["kv_cache_scales.json"])
    given = {"model_type": "llama", "ranks": 2, "layers": 6}
    assert sglang.why_refused(document, **given) == ""
    assert document["kv_cache"]["scaling_factor"]["1"]["5"] == 0.5
    assert report.counts == {"exact": 12, "approximated": 12, "unsupported": 0}
    assert "scale 0.25 -> 0.5" in report.layers[0].v[0].dropped[0]
    assert "tp-size 2" in found.notes[0]
    for wrong in (
        given | {"ranks": 1},
        given | {"layers": 5},
        given | {"model_type": "qwen2"},
    ):
        assert sglang.why_refused(document, **wrong)
    document["kv_cache"]["dtype"] = "fp8"
    assert sglang.why_refused(document, **given)


def test_modelopt_maps_layers_by_path():
    kinds = {
        0: (FP8(dim=D, scale="tensor"),) * 2,
        1: (NVFP4(dim=D),) * 2,
        2: (FP8(dim=D, scale="head"), NVFP4(dim=D)),
    }

    def choose(layer, side, head):
        return kinds.get(layer, (EXACT, EXACT))[side == "v"]

    found, report = run("modelopt", choose)
    document = json.loads(found.files["hf_quant_config.json"])["quantization"]
    start = "model.layers"
    assert document == {
        "kv_cache_quant_algo": "MIXED_PRECISION",
        "kv_cache_quantized_layers": {
            f"{start}.0.self_attn": {"quant_algo": "FP8"},
            f"{start}.1.self_attn": {"quant_algo": "NVFP4"},
            f"{start}.2.self_attn": {"quant_algo": "FP8_K_NVFP4_V"},
        },
        "kv_cache_schema_version": 1,
    }
    scales = safetensors.numpy.load(found.files["kv_scales.safetensors"])
    assert len(scales) == 6
    # One scale per layer and side: the largest of its heads, whose own entry stays exact.
    statuses = [h.status for h in report.layers[1].k]
    assert statuses.count("exact") == 1
    assert report.layers[4].k[0].status == "exact"
    assert any("Forward-looking" in note for note in found.notes)


def test_kvtuner_writes_bits_per_layer_or_per_head():
    yaml = pytest.importorskip("yaml")
    bits = {("k", 0): 4, ("v", 0): 2}

    def choose(layer, side, head):
        of = bits.get((side, layer), 4)
        kind = KiviKey if side == "k" else KiviValue
        return kind(dim=D, bits=of)

    found, report = run("kvtuner", choose)
    assert report.counts["exact"] == 24
    listed = yaml.safe_load(found.files["kvtuner_per_layer.yaml"])
    assert listed[0] == {"nbits_key": 4, "nbits_value": 2}
    settings = yaml.safe_load(found.files["kvtuner_settings.yaml"])
    assert settings["axis_key"] == -1
    assert settings["q_group_size"] == 32
    assert settings["residual_length"] == 128
    bits = {("k", 0): 8}
    found, report = run("kvtuner", lambda i, s, h: choose(i if h else 9, s, h))
    listed = yaml.safe_load(found.files["kvtuner_per_head.yaml"])
    assert listed[0][1] == {"nbits_key": 8, "nbits_value": 4}
    assert listed[0][0] == {"nbits_key": 4, "nbits_value": 4}
    assert report.layers[0].k[1].status == "approximated"


def test_ort_genai_scales_and_widening():
    def choose(layer, side, head):
        return PerChannel(dim=D, bits=8 if side == "k" else 4)

    _, arrays = pair(choose)
    found, report = run("ort-genai", choose)
    document = json.loads(found.files["kv_scales.json"])
    assert document["layer_ids"] == [0, 1, 2, 3, 4, 5]
    assert document["qmax"] == 128.0
    assert np.shape(document["scales"]["k_scales"]) == (6, 2 * D)
    # V of 4 bits is held in 8: the same range has a sixteenth of the scale, heads in order.
    v = arrays["layers.3.v.channel_scale"].reshape(-1)
    np.testing.assert_array_equal(document["scales"]["v_scales"][3], v / 16)
    assert report.counts == {"exact": 12, "approximated": 12, "unsupported": 0}
    assert "int8_per_channel" in found.flags[0]
    assert any("rotary pairs" in note for note in found.notes)

    wide = json.loads(run("ort-genai", choose, rope_envelope=True)[0].files["kv_scales.json"])
    k = arrays["layers.2.k.channel_scale"].astype(np.float64)
    norm = np.hypot(k[:, : D // 2], k[:, D // 2 :])
    found = np.reshape(wide["scales"]["k_scales"][2], (2, D))
    np.testing.assert_allclose(found, np.concatenate([norm, norm], axis=1), rtol=1e-6)
    assert wide["scales"]["v_scales"] == document["scales"]["v_scales"]


def test_ort_genai_fp8_per_tensor_and_dead_channels():
    found = run(
        "ort-genai",
        FP8(dim=D, scale="tensor"),
        arrays={
            f"layers.{i}.{s}.scale": np.full(2, 0.5, np.float32) for i in range(6) for s in "kv"
        },
    )[0]
    assert "fp8_per_tensor" in found.flags[0]
    assert json.loads(found.files["kv_scales.json"])["scales"]["k_scales"] == [0.5] * 6
    zero = {"layers.0.k.channel_scale": np.zeros((2, D), np.float32)}
    found = run("ort-genai", PerChannel(dim=D, bits=8), arrays=zero)[0]
    assert min(json.loads(found.files["kv_scales.json"])["scales"]["k_scales"][0]) > 0


def test_sliding_layers_are_unsupported_where_their_cache_cannot_be_quantized():
    layers = [dataclasses.replace(la, window=256 if la.index == 1 else None) for la in MODEL.layers]
    model = dataclasses.replace(MODEL, layers=tuple(layers))
    found, report = run("mlx-lm", TurboQuantMSE(dim=D, bits=4), model=model)
    assert "RotatingKVCache(max_size=256)" in found.files["turboq_cache.py"].decode()
    assert [layer.k[0].status for layer in report.layers].count("unsupported") == 1
    assert report.layers[1].k[0].engine_bits == 16 * D


def test_mlx_has_equal_bits_for_keys_and_values():
    found, report = run("mlx-lm", TurboQuantMSE(dim=D, bits=3), TurboQuantMSE(dim=D, bits=5))
    source = found.files["turboq_cache.py"].decode()
    compile(source, "turboq_cache.py", "exec")
    assert source.count("QuantizedKVCache(group_size=64, bits=6)") == 6
    assert report.layers[0].k[0].engine_bits == 6 * D + 32
    eighty = geometry(layers=2, kv_heads=1, k_dim=80, v_dim=80)
    plan, arrays = pair(TurboQuantMSE(dim=80, bits=4), model=eighty)
    held = ENGINES["mlx-lm"].project(plan, arrays, Options()).held
    assert not any(h.reduced for h in held.values())


def test_flags_of_jax_programs():
    found, report = run("maxtext", TurboQuantMSE(dim=D, bits=4))
    flags = "quantize_kvcache=true kv_quant_axis=dkv kv_quant_dtype=int4"
    assert found.flags == (flags,)
    assert report.layers[0].k[0].engine_bits == 4 * D + 16
    flags = run("maxtext", FP8(dim=D, scale="none"))[0].flags
    assert "kv_quant_dtype=int8" in flags[0]  # its configuration takes no other of 8 bits
    found, report = run("tpu-inference", FP8(dim=D, scale="none"))
    assert report.status == "exact"
    assert "--kv-cache-dtype fp8_e4m3" in found.flags[0]
