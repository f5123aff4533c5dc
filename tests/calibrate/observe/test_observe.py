"""A run: what transformers sees, in bounded memory, resumable at every point."""

import dataclasses
import errno
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from stat_cases import random_windows, windows_of
from tolerances import TOL

from turboq.errors import TurboqError
from turboq.plan import TextSource
from turboq_calibrate.models import load_model
from turboq_calibrate.observe import dry_run as estimate
from turboq_calibrate.observe import recipe as recipe_module
from turboq_calibrate.observe import stages, statistics
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe
from turboq_calibrate.observe.statistics_files import load_statistics

GOLDEN = Path(__file__).parent.parent.parent / "golden"
WORKER = Path(__file__).parent / "observe_worker.py"
ROOT = Path(__file__).parent.parent.parent.parent

_spec = importlib.util.spec_from_file_location("observe_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

CHUNKS = ObserveRecipe(windows_per_chunk=2)  # several, of few windows


def quiet(model, windows, out, recipe=CHUNKS, **options):
    return observe(model, windows, out, recipe, progress=False, log=lambda line: None, **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "statistics").iterdir())}


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "qwen3")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The statistics of the worker's case, from one run in this process."""
    out = tmp_path_factory.mktemp("whole")
    windows, recipe = worker.case(model.spec.vocab)
    quiet(model, windows, out, recipe)
    return contents(out)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_statistics_are_those_of_what_transformers_sees(name, tmp_path, monkeypatch):
    golden = np.load(GOLDEN / name / "golden.npz")
    model = load_model(GOLDEN / name, resident=False)
    tokens = golden["tokens"]
    windows = windows_of(tokens, "golden")
    recipe = ObserveRecipe(windows_per_chunk=2, skip=3, seed=5)
    where = jnp.asarray(golden["positions"])
    monkeypatch.setattr(stages.decoder, "default_positions", lambda tokens: where)
    result = quiet(model, windows, tmp_path, recipe)
    assert len(result.layers) == len(model.spec.layers)
    for i in range(len(result.layers)):
        for side in ("k", "v", "q"):
            got = getattr(result.layers[i], side)
            x = golden[f"{side}{i}"][:, 3:].astype(np.float64)
            x = x.reshape(-1, *x.shape[2:])
            size = np.abs(x).max()
            tolerance = TOL["capture_golden"] * size
            assert got.count.tolist() == [len(x)] * x.shape[1]
            np.testing.assert_allclose(got.mean, x.mean(axis=0), rtol=0, atol=tolerance)
            second = np.einsum("nhd,nhe->hde", x, x) / len(x)
            np.testing.assert_allclose(got.second_moment, second, rtol=0, atol=2 * tolerance * size)
            np.testing.assert_allclose(got.absmax, np.abs(x).max(axis=0), rtol=0, atol=tolerance)
            counted = got.arrays["channels"].sum(axis=2)
            assert counted.tolist() == np.full(x.shape[1:], len(x)).tolist()


def test_chunking_changes_rounding_only(model, tmp_path):
    windows = random_windows(model.spec.vocab, count=8)
    one = quiet(model, windows, tmp_path / "a", ObserveRecipe(windows_per_chunk=3))
    all_ = quiet(model, windows, tmp_path / "b", ObserveRecipe(windows_per_chunk=8))
    for i in range(len(one)):
        for side, a in one.layers[i].sides.items():
            b = all_.layers[i].sides[side]
            np.testing.assert_array_equal(a.count, b.count)
            size = np.sqrt(np.einsum("hdd->hd", a.second_moment)).max()
            np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=TOL["capture_golden"] * size)
        # The same labels are drawn and the same tokens kept, whatever the chunks.
        for name, x in vars(one.tokens(i)).items():
            y = getattr(all_.tokens(i), name)
            atol = TOL["model_gradient"] * np.abs(x).max() if x.dtype == np.float32 else 0
            np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


def test_memory_does_not_grow_with_the_text(model, tmp_path):
    peaks = {}
    for count in (4, 40):
        windows = random_windows(model.spec.vocab, count=count)
        quiet(model, windows, tmp_path / str(count))
        cost = json.loads((tmp_path / str(count) / "observe" / "run.json").read_text())
        peaks[count] = cost["peak_array_bytes"]
        assert cost["peak_rss_bytes"] > cost["peak_array_bytes"]
    assert peaks[40] == peaks[4]


def test_only_results_and_records_stay(model, tmp_path):
    most = []

    def observer(name, fields):
        files = [p.name for p in (tmp_path / "observe").glob("*_*.npy")]
        most.append(sum(not name.startswith("sampled") for name in files))

    quiet(model, random_windows(model.spec.vocab), tmp_path, observer=observer)
    assert max(most) == len(model.spec.layers) + 2  # as the dry run says
    assert sorted(p.name for p in (tmp_path / "observe").iterdir()) == [
        "events.jsonl",
        "inputs.json",
        "lock",
        "run.json",
    ]
    lines = (tmp_path / "observe" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events[-1]["event"] == "finished"
    manifest = json.loads((tmp_path / "statistics" / "manifest.json").read_text())
    assert manifest["inputs"]["model"]["fingerprint"] == model.fingerprint
    assert [layer["k_before"] for layer in manifest["layers"]] == [[2, 12], [2, 12]]


class Stop(Exception):
    pass


def stop_after(events):
    """An observer that raises after so many events."""
    left = [events]

    def observer(name, fields):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return observer


@pytest.mark.parametrize("every", [1, 3])
def test_stopping_anywhere_changes_nothing(model, uninterrupted, tmp_path, every):
    """Stops after 2, 3, ..., 8, 2, 3, ... events, again and again, until a run gets through."""
    windows, recipe = worker.case(model.spec.vocab)
    stops = 0
    while stops < 200:
        observer = stop_after(2 + stops % 7)
        try:
            quiet(model, windows, tmp_path, recipe, checkpoint_every=every, observer=observer)
            break
        except Stop:
            stops += 1
    assert stops >= 5
    assert contents(tmp_path) == uninterrupted


def start(out, event, count):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "calibrate")),
        # The first process compiles, the others start faster.
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(WORKER), str(out), str(GOLDEN / "qwen3"), event, str(count)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_sigkill_anywhere_changes_nothing(uninterrupted, tmp_path_factory):
    """A real process, killed at planted points and at random times, then left to finish."""
    tmp_path = tmp_path_factory.mktemp("killed") / "out"
    for event, count in (("gradient", 2), ("checkpoint", 4)):
        process = start(tmp_path, event, count)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, event
    rng = np.random.default_rng()
    log = tmp_path / "observe" / "events.jsonl"
    for _ in range(1):
        lines = log.read_bytes().count(b"\n")
        process = start(tmp_path, "never", 1)
        while log.read_bytes().count(b"\n") == lines and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
    process = start(tmp_path, "never", 1)
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()
    assert contents(tmp_path) == uninterrupted


def test_other_inputs_are_refused_field_by_field(model, tmp_path, monkeypatch):
    windows, recipe = random_windows(model.spec.vocab), CHUNKS
    with pytest.raises(Stop):
        quiet(model, windows, tmp_path, recipe, observer=stop_after(6))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other_text = dataclasses.replace(windows, texts=(TextSource(name="b.txt", sha256="f" * 64),))
    for arguments, fields in (
        ((model, other_text, recipe), {"text.texts[0].sha256", "text.texts[0].name"}),
        (
            (model, random_windows(model.spec.vocab, seed=2), recipe),
            {"text.tokens_sha256"},
        ),
        ((model, windows, ObserveRecipe(windows_per_chunk=2, skip=3)), {"recipe.skip"}),
        (
            (model, windows, ObserveRecipe(windows_per_chunk=2, reservoir=7, seed=1)),
            {"recipe.reservoir", "recipe.seed"},
        ),
        (
            (load_model(GOLDEN / "qwen3", dtype="bfloat16"), windows, recipe),
            {"model.dtype"},
        ),
        (
            (load_model(GOLDEN / "llama3"), windows, recipe),
            {"model.fingerprint", "model.family", "model.name"},
        ),
    ):
        with pytest.raises(TurboqError, match="statistics of other inputs") as error:
            quiet(arguments[0], arguments[1], tmp_path, arguments[2])
        named = str(error.value).split("(", 1)[1].rsplit(")", 1)[0].split("; ")
        assert {line.split(":")[0] for line in named} == fields
    monkeypatch.setattr(statistics, "VERSION", statistics.VERSION + 1)
    with pytest.raises(TurboqError, match="statistics_version: there 2, now 3"):
        quiet(model, windows, tmp_path, recipe)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before


def test_inputs_hold_no_floats(model):
    """Derived floats differ between machines and would make a run impossible to resume."""

    def leaves(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [leaf for v in value for leaf in leaves(v)]
        return [value]

    inputs = recipe_module.observe_inputs(
        recipe_module.identity(model), random_windows(model.spec.vocab), CHUNKS
    )
    assert all(isinstance(leaf, str | int) for leaf in leaves(inputs))


def test_a_finished_folder_is_returned(model, tmp_path):
    windows = random_windows(model.spec.vocab)
    quiet(model, windows, tmp_path)
    log = (tmp_path / "observe" / "events.jsonl").read_bytes()
    again = quiet(model, windows, tmp_path)
    assert (tmp_path / "observe" / "events.jsonl").read_bytes() == log
    assert len(again) == len(model.spec.layers)
    (tmp_path / "observe" / "inputs.json").unlink()
    with pytest.raises(TurboqError, match=r"recipe\.skip: there 4, now 5"):
        quiet(model, windows, tmp_path, ObserveRecipe(windows_per_chunk=2, skip=5))
    path = tmp_path / "statistics" / "layer_001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    loaded = load_statistics(tmp_path)
    assert loaded.layers[0].k.heads == 2
    with pytest.raises(TurboqError, match=r"layer_001.* damaged"):
        _ = loaded.layers[1]


def poisoned(layer, name, row, value):
    """The golden model with one weight replaced after loading."""
    model = load_model(GOLDEN / "qwen3")
    weights = model._layers[layer]
    model._layers[layer] = weights | {name: weights[name].at[row].set(value)}
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_located(tmp_path, value):
    bad = poisoned(1, "v", 13, value)  # rows 12..23 of v belong to head 1
    windows = random_windows(bad.spec.vocab)
    with pytest.raises(TurboqError) as error:
        quiet(bad, windows, tmp_path)
    message = str(error.value)
    assert "NaN or infinity in v of head 1, layer 1 (model.layers.1.self_attn)" in message
    assert "chunk 0 (windows 0 to 1)" in message
    assert not (tmp_path / "statistics" / "manifest.json").exists()


def test_bad_chunks_are_located(tmp_path):
    """A token whose embedding is infinite stands in the second chunk only."""
    bad = load_model(GOLDEN / "qwen3")
    bad._embed = {"embedding": bad._embed["embedding"].at[7].set(jnp.inf)}
    windows = random_windows(bad.spec.vocab, count=8)
    windows.tokens[windows.tokens == 7] = 8
    windows.tokens[6, 1] = 7
    with pytest.raises(
        TurboqError, match=r"in k of head 0, 1, layer 0 .* chunk 3 \(windows 6 to 7"
    ):
        quiet(bad, windows, tmp_path)


def test_bad_outputs_are_located(tmp_path):
    bad = poisoned(0, "down", 3, float("nan"))
    with pytest.raises(TurboqError, match=r"NaN or infinity in the output, layer 0"):
        quiet(bad, random_windows(bad.spec.vocab), tmp_path)


def test_bad_sizes_are_refused(model, tmp_path):
    vocab = model.spec.vocab
    with pytest.raises(TurboqError, match="windows of 16 tokens leave none after skip=16"):
        quiet(model, random_windows(vocab), tmp_path, ObserveRecipe(windows_per_chunk=2, skip=16))
    wrong = random_windows(vocab)
    wrong.tokens[1, 2] = 500
    with pytest.raises(TurboqError, match=f"token 500 is outside .* vocabulary of {vocab}"):
        quiet(model, wrong, tmp_path)
    for bad in ({"skip": -1}, {"windows_per_chunk": 0}, {"reservoir": -1}, {"seed": 2**32}):
        with pytest.raises(ValueError, match="must be"):
            ObserveRecipe(**bad)
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        quiet(model, random_windows(vocab), tmp_path, checkpoint_every=0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_earlier_results(model, tmp_path, monkeypatch):
    windows = random_windows(model.spec.vocab)
    quiet(model, windows, tmp_path / "old")
    before = contents(tmp_path / "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TurboqError, match=r"cannot reserve .* No space left"):
        quiet(model, windows, tmp_path / "new")
    assert contents(tmp_path / "old") == before
    monkeypatch.undo()
    quiet(model, windows, tmp_path / "new")
    assert contents(tmp_path / "new") == before


def test_bad_folders_are_refused(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TurboqError, match=r"is a file|Not a directory"):
        quiet(model, random_windows(model.spec.vocab), tmp_path / "file")
    work = tmp_path / "busy" / "observe"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(TurboqError, match="another run is observing"):
            quiet(model, random_windows(model.spec.vocab), tmp_path / "busy")


def test_lost_working_files_are_named(model, tmp_path):
    windows = random_windows(model.spec.vocab, count=12)
    with pytest.raises(Stop):
        quiet(model, windows, tmp_path, observer=stop_after(5), checkpoint_every=1)
    (tmp_path / "observe" / "hidden_000.npy").unlink()
    with pytest.raises(TurboqError, match=r"hidden_000\.npy: No such file"):
        quiet(model, windows, tmp_path)


def test_dry_run_tells_and_writes_nothing(model, tmp_path):
    lines = []
    windows, recipe = random_windows(model.spec.vocab, count=8), CHUNKS
    told = estimate.dry_run(model, windows, tmp_path / "new" / "folder", recipe, log=lines.append)
    assert not list(tmp_path.iterdir())
    text = "\n".join(lines)
    for part in ("2 layers", "2 KV heads", "head dim 12", "memory:", "disk:", "time: about"):
        assert part in text
    assert told.chunks == 4
    kept = 8 * 12 * 2 * 2 * (12 + 12) * 4  # tokens, x and g, heads, K and V dims, float32
    assert told.hidden_disk_bytes == 4 * 8 * 16 * model.spec.hidden * 4 + kept
    weights = [model.layer(0), model.head_params()]
    assert told.weight_bytes == max(sum(w.nbytes for w in part.values()) for part in weights)
    assert min(told.chunk_seconds, told.head_seconds) > 0
    assert told.seconds >= 4 * (2 * told.chunk_seconds + told.head_seconds)
    quiet(model, windows, tmp_path, recipe)
    held = sum(p.stat().st_size for p in (tmp_path / "statistics").glob("*.safetensors"))
    assert held <= told.statistics_disk_bytes


def test_dry_run_refuses_a_small_disk(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TurboqError, match="of disk, which is not free"):
        estimate.dry_run(model, random_windows(model.spec.vocab), tmp_path, log=lambda line: None)


def test_a_run_leaves_the_model_as_it_was(model, tmp_path):
    before = {k: np.asarray(v).copy() for k, v in model.layer(0).items()}
    quiet(model, random_windows(model.spec.vocab), tmp_path)
    for name, value in model.layer(0).items():
        assert isinstance(value, jnp.ndarray)
        np.testing.assert_array_equal(np.asarray(value), before[name])
