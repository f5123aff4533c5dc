"""`turboq memory` from the command line: known answers, formats, picture, and bad input."""

import csv
import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import quality_cases

from turboq.cache.layer import TokenPolicy
from turboq.codecs import TurboQuantMSE
from turboq.plan import LayerGeometry, ModelGeometry, save, uniform_plan
from turboq_calibrate.cli import main as cli
from turboq_calibrate.measure.quality_table import write_quality
from turboq_calibrate.what_fits.text import COLUMNS

GOLDEN = Path(__file__).parent / "golden" / "llama3"
GIB = 2**30
LLAMA = "--geometry=llama-3-8b"
Q4_ON_8 = ("--weights=Q4_K_M", "--working_gib=0.5", "--memory_gib=8")


@pytest.fixture
def ask(capsys):
    """Runs `turboq memory` and reads its JSON."""

    def run(*argv) -> dict:
        assert cli.run(["memory", *map(str, argv), "--format=json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def config(tmp_path: Path, **fields) -> Path:
    """A folder with a config.json of a plain model, some fields changed."""
    usual = {
        "model_type": "llama", "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 4096,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(usual | fields))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "context", "codec", "per_token", "kv_bytes"),
    [
        ("llama-3-8b", 32768, "f16", 131072, 4 * GIB),
        ("llama-3-8b", 32768, "q8_0", 69632, 2.125 * GIB),
        ("llama-3-8b", 32768, "q4_0", 36864, 1.125 * GIB),
        ("qwen2.5-32b", 32768, "fp16", 262144, 8 * GIB),
        ("qwen3.5-4b", 32768, "bf16", 32768, GIB),
        ("60x4x128", 131072, "f16", 122880, 15 * GIB),
        ("gemma-4-31b", 32768, "f16", 901120, 3.28125 * GIB),
    ],
)
def test_known_answers(ask, source, context, codec, per_token, kv_bytes):
    found = ask(f"--geometry={source}", f"--context={context}", f"--codec={codec}")
    assert (found["bytes_per_token"], found["kv_bytes"]) == (per_token, kv_bytes)
    assert found["max_context"] == found["geometry"]["context"]
    # The same words on the command line answer what fits: exactly this much, and not a byte less.
    gib = found["needed_bytes"] / GIB  # of Qwen3.5 with the state of its 24 other layers
    assert found["needed_bytes"] == kv_bytes + found["state_bytes"]
    fits = ask(f"--geometry={source}", f"--codec={codec}", f"--memory_gib={gib}")
    assert fits["max_context"] == context
    assert found["view"] == "engine"


def test_a_config_json_with_windows(ask, tmp_path):
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 10
    model = config(tmp_path, model_type="gemma3_text", layer_types=types, sliding_window=1024)
    for path in (model, model / "config.json"):
        found = ask(f"--model={path}", "--context=32768", "--codec=f16")
        assert found["kv_bytes"] == 2048 * (10 * 32768 + 50 * 1024)
        assert found["bytes_per_token"] == 60 * 2048
        assert found["bytes_per_token_beyond_windows"] == 10 * 2048
    rows = {row["kind"]: row for row in found["layers"]}
    assert (rows["sliding"]["layers"], rows["sliding"]["tokens_kept"]) == (50, 1024)
    assert sum(row["bytes"] for row in found["layers"]) == found["kv_bytes"]


def test_states_and_index_keys_are_said(ask, tmp_path, capsys):
    """3 layers of 4 KV heads of 128 + 128, 2 with an index key of 64; a state of unknown size."""
    sparse = ["full_attention", "indexed_attention", "indexed_attention"]
    model = config(tmp_path, num_hidden_layers=3, index_head_dim=64, layer_types=sparse)
    found = ask(f"--model={model}", "--context=1000")
    assert found["bytes_per_token"] == (3 * 4 * 256 + 2 * 64) * 2
    assert found["kv_bytes"] == found["bf16_bytes"] == found["bytes_per_token"] * 1000
    assert [(row["layers"], row["index_dim"]) for row in found["layers"]] == [(1, 0), (2, 64)]
    # turboq's codecs store heads; index keys stay in 16 bits.
    codec = ask(f"--model={model}", "--codec=turboquant_mse", "--bits=3")["bytes_per_token"]
    assert codec == 3 * 4 * 2 * (128 * 3 + 16) // 8 + 2 * 64 * 2
    assert cli.run(["memory", f"--model={model}", "--view=ours"]) == 1
    assert "caches index keys of sparse attention" in capsys.readouterr().err
    types = ["linear_attention", "linear_attention", "full_attention"]
    model = config(tmp_path, num_hidden_layers=3, layer_types=types)
    assert ask(f"--model={model}")["layers_of_unknown_state"] == 2
    assert cli.run(["memory", f"--model={model}"]) == 0
    assert "of 2 layers is not known and not counted" in capsys.readouterr().out


def test_choice_on_8_gb(ask):
    """Llama-3-8B Q4_K_M: f16 at short contexts, q8_0 at 32k, q4_0 beyond 45k."""
    picks = {}
    for context in (16384, 32768, 65536, 131072):
        choose = ("--choose=f16,q8_0,q4_0", f"--context={context}")
        picks[context] = ask(LLAMA, *Q4_ON_8, *choose)["choice"]["chosen"]
    assert picks == {16384: "f16", 32768: "q8_0", 65536: "q4_0", 131072: None}


def test_choice_by_measured_quality(ask, tmp_path):
    """A quality table that likes q4_0 better than q8_0 turns the order round."""
    kl = {("q8_0", "a"): 0.7, ("q8_0", "b"): 0.3, ("small", "a"): 0.1, ("small", "b"): 0.3}
    rows = [quality_cases.row(name, kl=x, text=text) for (name, text), x in kl.items()]
    write_quality(quality_cases.quality(rows, ("a", "b")), tmp_path)
    quality = f"--quality={tmp_path}"
    rows = [quality_cases.row(name, kl=0.1) for name in ("exact", "kivi 2b", "q8_0/q4_0")]
    write_quality(quality_cases.quality(rows, ("noise",)), tmp_path / "rows")
    words = ("--choose=exact,kivi:2", "--choose=q8_0/q4_0", f"--quality={tmp_path / 'rows'}")
    assert ask(LLAMA, *Q4_ON_8, *words)["choice"]["options"][0]["name"] == "exact"
    choice = ask(LLAMA, *Q4_ON_8, "--choose=q8_0,small=q4_0", quality)["choice"]
    assert (choice["chosen"], choice["order"]) == ("small", "measured mean KL")
    assert [o["kl"] for o in choice["options"]] == [0.2, 0.5]  # means over the texts


def plan_folder(folder: Path) -> Path:
    """A plan of two layers of 2 KV heads of 16, as the golden model has."""
    layers = tuple(
        LayerGeometry(index=i, path=f"l.{i}", kv_heads=2, q_heads=4, k_dim=16, v_dim=16, window=w)
        for i, w in enumerate((None, 100))
    )
    model = ModelGeometry(fingerprint="sha256:1", family="llama", name="tiny", layers=layers)
    codec = TurboQuantMSE(dim=16, bits=3)
    plan = uniform_plan(model, k=codec, v=codec, policy=TokenPolicy(sinks=4))
    save(plan, {}, folder)
    return folder


def test_a_plan_in_both_views(ask, tmp_path):
    plan = plan_folder(tmp_path)
    token = 2 * 2 * (16 * 3 + 16) // 8  # one layer: K and V of 2 heads, codes and a scale
    ours = ask(f"--plan={plan}", "--context=1000")
    exact = 2 * 2 * 2 * 4 * 16 * 2  # layers, sides, heads, sinks, D, bfloat16
    assert ours["view"] == "ours"
    assert ours["kv_bytes"] == ours["views"]["ours"] == token * (1024 + 512) + exact
    # Of the window of 100 tokens two pages are held, which it can touch.
    assert list(ours["views"]["difference"].values()) == [token * (24 + 412), exact]
    engine = ask(f"--plan={plan}", "--context=1000", "--view=engine")
    assert engine["kv_bytes"] == ours["views"]["engine"] == token * (1000 + 100)
    choice = ask(
        f"--model={GOLDEN}", f"--choose=mine={plan},bf16/f16", "--memory_gib=1", "--codec=f32"
    )["choice"]
    assert choice["chosen"] == "mine"


def test_codecs_and_gguf_and_sinks(ask):
    flags = ("--codec=turboquant_mse", "--bits=3", "--context=1000")
    plain = ask(f"--model={GOLDEN}/model.gguf", *flags)
    assert plain["kv_bytes"] == 1000 * plain["bytes_per_token"] == 1000 * 64
    sinks = ask(f"--model={GOLDEN}", *flags, "--sinks=4")
    assert sinks["kv_bytes"] == 1024 * 64 + 4 * 256
    two = ask(LLAMA, "--k_codec=q8_0", "--v_codec=q4_0", "--context=32768")
    assert (two["codec"], two["kv_bytes"]) == ("q8_0/q4_0", 1.625 * GIB)
    # K in an engine's format beside V in a codec: 8.5 and 3 + 16 / 128 bits.
    mixed = ask(LLAMA, "--codec=q8_0/turboquant_mse:3")
    assert mixed["bytes_per_token"] == 32 * 8 * 128 * (8.5 + 3.125) / 8
    assert ask(LLAMA, "--codec=exact", "--dtype=float32")["bytes_per_token"] == 262144
    latent = ask("--geometry=deepseek-v3", *flags)
    assert latent["bytes_per_token"] == 61 * (576 * 3 + 16) / 8


def test_prefix_weights_and_overhead(ask):
    base = (LLAMA, "--codec=f16", "--batch=8", "--prefix=24576")
    found = ask(*base, "--overhead_percent=10", "--weights_gib=5", "--working_gib=1")
    assert found["kv_bytes"] == 131072 * (24576 + 8 * 8192) == 11 * GIB
    assert found["needed_bytes"] == pytest.approx(6 * GIB + 1.1 * 11 * GIB, abs=1)
    auto = ask(f"--model={GOLDEN}", "--weights=auto")
    assert auto["weights_bytes"] == (GOLDEN / "model.safetensors").stat().st_size
    assert auto["geometry"]["weights_from"] == "model.safetensors"


def test_one_of_several_ranks(ask):
    """8 KV heads over 2 and 16 ranks, 10 over 4; latents whole on each; a share of the weights."""
    for ranks, heads in ((2, 4), (16, 1)):
        found = ask(LLAMA, "--weights=f16", f"--tensor_parallel={ranks}")
        assert found["bytes_per_token"] == 32 * heads * 256 * 2
        assert found["weights_bytes"] == 8030261248 * 2 // ranks
    assert ask("--geometry=phi-4", "--tensor_parallel=4")["bytes_per_token"] == 40 * 3 * 256 * 2
    # DeepSeek-V3 on 8 cards of 80 GiB: each holds every token's latent vectors.
    cards = ("--geometry=deepseek-v3", "--tensor_parallel=8", "--memory_gib=80", "--weights=int4")
    deepseek = ask(*cards)
    assert deepseek["max_context"] == (80 * GIB - 671026419200 // 16) // (61 * 576 * 2)
    assert "latent vectors lie on every rank" in deepseek["geometry"]["note"]
    auto = (f"--model={GOLDEN}", "--weights=auto")
    whole, half = ask(*auto), ask(*auto, "--tensor_parallel=2")
    assert half["weights_bytes"] == -(-whole["weights_bytes"] // 2)
    assert half["kv_bytes"] == whole["kv_bytes"] // 2


def test_the_estimate_is_labelled_and_by_hand(ask, capsys):
    flags = (LLAMA, "--codec=f16", "--weights_gib=4", "--bandwidth_gbs=100", "--efficiency=0.5")
    found = ask(*flags)["estimate"]
    assert found["tokens_per_second"] == pytest.approx(50e9 / (8 * GIB))
    assert cli.run(["memory", *flags]) == 0
    text = capsys.readouterr().out
    assert "ESTIMATE from bandwidth, not measured" in text
    assert "assumes 100 GB/s at 50%" in text


def test_text_and_csv_say_what_json_says(ask, capsys):
    flags = (LLAMA, *Q4_ON_8, "--choose=f16,q8_0,q4_0", "--codec=q8_0")
    found = ask(*flags)
    assert cli.run(["memory", *flags, "--format=text"]) == 0
    text = capsys.readouterr().out
    assert cli.run(["memory", *flags]) == 0
    assert capsys.readouterr().out == text
    assert "2.125 GiB = 2,281,701,376 bytes" in text
    assert "best quality that fits 8 GiB at 32,768 tokens: q8_0" in text
    assert f"{found['max_context']:,} tokens" in text
    assert cli.run(["memory", *flags, "--format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == len(found["cards"]) == 3 * 6
    for row, card in zip(rows, found["cards"], strict=True):
        assert (row["codec"], float(row["memory_gib"])) == (card["codec"], card["gib"])
        assert (int(row["max_context"]), int(row["max_sessions"])) == (
            card["max_context"],
            card["sessions"],
        )
    q8 = [r for r in rows if r["codec"] == "q8_0"]
    assert (q8[0]["kv_bytes"], q8[0]["bytes_per_token"]) == ("2281701376", "69632")
    assert int(q8[0]["max_context"]) == found["max_context"]


def test_a_context_above_the_model_is_said_or_refused(ask, capsys):
    flags = ("memory", f"--model={GOLDEN}", "--context=257")
    assert ask(*flags[1:])["geometry"]["above_its_context"]
    assert not ask(*flags[1:-1], "--context=256")["geometry"]["above_its_context"]
    assert cli.run(list(flags)) == 0
    assert "257 is above the 256 tokens" in capsys.readouterr().out
    assert cli.run([*flags, "--strict_context"]) == 1
    assert "--context=257 is above the 256 tokens that llama3" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_picture(tmp_path, ending):
    flags = [LLAMA, "--weights=Q4_K_M", "--choose=f16,q8_0,q4_0", "--format=csv"]
    files = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for file in files:
        assert cli.run(["memory", *flags, f"--picture={file}"]) == 0
    raw = files[0].read_bytes()
    assert raw == files[1].read_bytes()
    if ending == "png":
        width, height = struct.unpack(">II", raw[16:24])
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        assert width > height > 500
        return
    text = raw.decode()
    for words in ("q8_0", "8 GB card", "context, tokens", "memory needed, GiB", "model's context"):
        assert words in text


def test_list_of_geometries(capsys):
    assert cli.run(["memory", "--geometry=list"]) == 0
    assert "llama-3-8b\n" in capsys.readouterr().out


def test_counting_formats_does_not_wait_for_jax():
    code = (
        "import sys; from turboq_calibrate.cli.main import run; "
        "code = run(['memory', '--geometry=llama-3-8b', '--codec=q8_0', '--choose=f16,q4_0']); "
        "sys.exit(code or 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def hostile(tmp_path: Path) -> None:
    """Files that the cases below name."""
    for name, text in {
        "cut": '{"model_type": "llama", "num_hidden_layers": 6',
        "deep": "[" * 100_000,
        "list": "[1, 2]",
        "digits": '{"model_type": "llama", "num_hidden_layers": ' + "9" * 5000 + "}",
        "negative": '{"model_type": "llama", "num_hidden_layers": -1}',
        "odd": '{"model_type": "llama", "num_hidden_layers": 2, "kv_magic": 3}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "cut.gguf").write_bytes((GOLDEN / "model.gguf").read_bytes()[:900])
    shutil.copy(GOLDEN / "config.json", tmp_path / "model.bin")
    plan_folder(tmp_path / "plan")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--geometry=lama-3-8b"], "unknown geometry 'lama-3-8b' (nearest: llama-3-8b"),
        (["--geometry=60x0x128"], "0 KV heads must be 1..1024"),
        ([LLAMA, "--model=x"], "give either --plan, or --model or --geometry"),
        ([LLAMA, "--codec=q9_0"], "'q9_0' is no codec, format or path: did you mean q8_0"),
        ([LLAMA, "--codec=q8_0", "--bits=3"], "--bits is not a field of q8_0, an engine's format"),
        ([LLAMA, "--codec=turboquant_mse"], "needs bits: turboquant_mse:3, or --bits"),
        ([LLAMA, "--codec=turboquant_mse:3", "--bits=3"], "bits=3 and --bits: name it once"),
        ([LLAMA, "--codec=3bit"], "did you mean turboquant_mse:3?"),
        (["--geometry=60x4x80", "--codec=q4_0"], "80 numbers is not whole blocks of 32"),
        (
            ["--geometry=60x4x80", "--choose=llama.cpp", "--memory_gib=9"],
            "q8_0, q5_1, q5_0, q4_1, iq4_nl, q4_0 keep blocks of 32 numbers, and heads of 60x4x80 "
            "have 80: --choose=f16 fits",
        ),
        ([LLAMA, "--weights=Q4_K_M", "--memory_gib=4"], "weights (4.58 GiB)"),
        ([LLAMA, "--weights=Q4", "--weights_gib=3"], "not both"),
        (["--plan={tmp}/plan", "--tensor_parallel=2"], "a plan says what each of its heads is"),
        ([LLAMA, "--choose=x={tmp}/plan", "--tensor_parallel=2"], "does not divide a plan"),
        ([LLAMA, "--tensor_parallel=4096"], "--tensor_parallel=4096 must be 1..1024"),
        (["--geometry=60x4x128", "--weights=f16"], "give --weights_gib"),
        ([LLAMA, "--weights=auto"], "--weights=auto needs the weight files of llama-3-8b: no"),
        ([LLAMA, "--prefix=40000"], "--prefix=40000 is above --context=32768"),
        ([LLAMA, "--memory_gib=nan"], "--memory_gib=nan must be a number"),
        ([LLAMA, "--weights_gib=inf"], "--weights_gib=inf must be a number"),
        ([LLAMA, "--cards=8,much"], "--cards=8,much must be sizes"),
        ([LLAMA, "--choose=f61"], "'f61' is no codec, format or path: did you mean f16"),
        ([LLAMA, "--choose=f16,fp16"], "names 'f16' twice"),
        ([LLAMA, "--choose=x={tmp}/plan"], "not shaped as llama-3-8b"),
        ([LLAMA, "--quality={tmp}"], "--quality ranks the options of --choose"),
        ([LLAMA, "--choose=f16", "--memory_gib=9", "--quality={tmp}"], "quality.json"),
        ([LLAMA, "--bandwidth_gbs=0"], "must be positive"),
        ([LLAMA, "--picture={tmp}/a.pdf"], "must end in .svg or .png"),
        ([LLAMA, "--picture={tmp}/no/a.svg"], "cannot write"),
        (["--geometry=deepseek-v3", "--view=ours"], "one latent vector per token"),
        ([LLAMA, "--view=ours", "--codec=int8"], "no codec for int8 (static scales"),
        (["--model={tmp}/cut.json"], "not valid JSON"),
        (["--model={tmp}/deep.json"], "nested too deeply"),
        (["--model={tmp}/list.json"], "must hold a JSON object"),
        (["--model={tmp}/digits.json"], "not valid JSON"),
        (["--model={tmp}/negative.json"], "num_hidden_layers=-1 must be a whole number"),
        (["--model={tmp}/odd.json"], "kv_magic=3 is not understood"),
        (["--model={tmp}/cut.gguf"], "cut.gguf is truncated"),
        (["--model={tmp}/model.bin"], "must be a Hugging Face folder"),
        (["--model={tmp}/absent"], "absent does not exist"),
        (["--model={tmp}"], "config.json"),
    ],
)
def test_bad_input_is_one_line(argv, says, tmp_path, capsys):
    hostile(tmp_path)
    assert cli.run(["memory", *(a.format(tmp=tmp_path) for a in argv)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turboq: error: ")
    assert err.count("\n") == 1
    assert says in err
