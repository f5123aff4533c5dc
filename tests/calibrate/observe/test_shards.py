"""A divided run put together is the undivided one: counts and tokens exactly, sums to rounding."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from stat_cases import random_windows

from turboq.errors import TurboqError
from turboq_calibrate.cli.main import run as turboq
from turboq_calibrate.models import load_model
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.merge_shards import merge_shards
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe, Shard

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "qwen3"
RECIPE = ObserveRecipe(skip=2, windows_per_chunk=2, reservoir=40)
SHARDS = 4


def quiet(*arguments, **options):
    return observe(*arguments, progress=False, log=lambda line: None, **options)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def windows(model):
    """Eleven windows: the last chunk is a short one."""
    return random_windows(model.spec.vocab, count=11, length=12, seed=3)


@pytest.fixture(scope="module")
def whole(model, windows, tmp_path_factory):
    return quiet(model, windows, tmp_path_factory.mktemp("whole"), RECIPE)


@pytest.fixture(scope="module")
def parts(model, windows, tmp_path_factory):
    folders = [tmp_path_factory.mktemp(f"shard{i}") for i in range(SHARDS)]
    for i, folder in enumerate(folders):
        quiet(model, windows, folder, RECIPE, shard=Shard(index=i, count=SHARDS))
    return folders


def test_shards_are_whole_chunks_that_cover_the_text_once():
    for chunks, count in itertools.product(range(1, 20), range(1, 8)):
        if chunks < count:
            with pytest.raises(TurboqError, match=f"use at most {chunks} shards"):
                Shard(index=0, count=count).of(chunks)
            continue
        ranges = [Shard(index=i, count=count).of(chunks) for i in range(count)]
        assert [c for r in ranges for c in r] == list(range(chunks))
        assert all(len(r) >= 1 for r in ranges)


def test_merged_shards_equal_one_process(whole, parts, tmp_path):
    merged = merge_shards(parts[::-1], tmp_path, progress=False)
    assert merged.manifest.inputs == whole.manifest.inputs
    assert merged.manifest.tokens == whole.manifest.tokens
    assert len(merged) == len(whole)
    np.testing.assert_array_equal(merged.windows, whole.windows)
    for i in range(len(whole)):
        for side in whole.layers[i].sides:
            got, want = (x.layers[i].sides[side].arrays for x in (merged, whole))
            for field in st.fields_of(side):
                a, b = got[field.name], want[field.name]
                if field.dtype == "float64" and field.reduce == "sum":
                    # m - 1 = 5 additions of 6 chunk sums either way. The size of a sum of either
                    # sign is bounded by those of its squares, by the inequality of Cauchy.
                    limit = 2 * 5 * 2.0**-53 * size_of(want, field.name)
                    assert np.all(np.abs(a - b) <= limit), field.name
                else:
                    np.testing.assert_array_equal(a, b, err_msg=field.name)
        a, b = vars(merged.tokens(i)), vars(whole.tokens(i))
        for name, want in b.items():
            np.testing.assert_array_equal(a[name], want, err_msg=name)


def size_of(arrays, name):
    """A bound on the sum of |terms| of a field."""
    if name in ("fisher", "energy"):
        diagonal = np.sqrt(np.einsum("hdd->hd", arrays["fisher"]))
        return diagonal[:, :, None] * diagonal[:, None] if name == "fisher" else arrays[name]
    first, second = name in ("sum", "weighted_sum"), "second"
    weight = arrays["count"].astype(np.float64)
    if name.startswith("weighted"):
        second, weight = "weighted_second", arrays["energy"]
    diagonal = np.sqrt(np.einsum("hdd->hd", arrays[second]))
    if first:
        return diagonal * np.sqrt(weight)[:, None]
    return diagonal[:, :, None] * diagonal[:, None]


def test_layers_without_a_cache_are_merged_too(tmp_path):
    """Of two delta-nets around one attention layer, the last of all."""
    model = load_model(GOLDEN.parent / "qwen3_5")
    windows = random_windows(model.spec.vocab, count=4, length=12, seed=3)
    folders = [tmp_path / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        quiet(model, windows, folder, RECIPE, shard=Shard(index=i, count=2))
    merged = merge_shards(folders, tmp_path / "merged", progress=False)
    assert merged.manifest.tokens == 4 * (12 - 2)
    heads = [merged.layers[i].k.heads for i in range(3)]
    assert heads == [0, 1, 0]
    assert merged.layers[1].k.count.tolist() == [40]
    assert merged.tokens(0).k.shape == (40, 0, 0)


def test_the_order_of_the_folders_does_not_matter(parts, tmp_path):
    found = set()
    for n, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2])):
        out = tmp_path / str(n)
        merge_shards([parts[i] for i in order], out, progress=False)
        files = sorted((out / "statistics").iterdir())
        found.add(tuple((f.name, f.read_bytes()) for f in files))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda p: p[:2] + p[3:], "shards 2/4 are missing"),
        (lambda p: [*p, p[1]], "shard 1/4 was given twice"),
        (lambda p: [], "nothing to merge"),
    ],
)
def test_wrong_sets_of_shards_are_refused(parts, tmp_path, choose, message):
    with pytest.raises(TurboqError, match=message):
        merge_shards(choose(parts), tmp_path, progress=False)
    assert not (tmp_path / "statistics" / "manifest.json").exists()


def test_foreign_shards_are_refused_with_what_differs(model, windows, parts, tmp_path):
    recipe = dataclasses.replace(RECIPE, skip=3)
    quiet(model, windows, tmp_path / "b", recipe, shard=Shard(index=1, count=SHARDS))
    with pytest.raises(TurboqError, match=r"recipe\.skip: there 2, now 3"):
        merge_shards([parts[0], tmp_path / "b"], tmp_path / "out", progress=False)


def test_a_whole_run_is_not_a_shard(whole, tmp_path):
    with pytest.raises(TurboqError, match="is a whole run"):
        merge_shards([whole.folder], tmp_path, progress=False)


def test_commands_divide_and_merge(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Keys and values wait in pages. " * 60)
    common = [
        f"--model={GOLDEN.parent / 'llama3'}", f"--text={text}", "--window_length=16",
        "--windows=6", "--chunk_windows=2",
    ]  # fmt: skip
    for i in range(2):
        out = tmp_path / f"s{i}"
        assert turboq(["calibrate", *common, f"--shard={i}/2", f"--out={out}"]) == 0
    assert turboq(["merge", f"--out={tmp_path}/all", f"{tmp_path}/s1", f"{tmp_path}/s0"]) == 0
    manifest = json.loads((tmp_path / "all" / "statistics" / "manifest.json").read_text())
    assert manifest["tokens"] == 6 * (16 - 4)
    assert "shard" not in manifest["inputs"]
    assert manifest["layers"][0]["tokens"]["file"] == "tokens_000.safetensors"
    capsys.readouterr()
    assert turboq(["calibrate", *common, "--shard=2/2", f"--out={tmp_path}/s2"]) == 1
    assert "must be i/n with 0 <= i < n" in capsys.readouterr().err
    assert turboq(["merge", f"--out={tmp_path}/none"]) == 1
    assert "name the folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=4"], "must be DATAxMODEL"),
        (["--mesh=3x5"], "does not use all"),
        (["--coordinator=127.0.0.1:1"], "--coordinator needs --mesh"),
        (["--coordinator=127.0.0.1:1", "--mesh=1x1"], "needs --processes and --process"),
    ],
)
def test_bad_mesh_flags_are_one_line(tmp_path, capsys, flags, message):
    words = ["calibrate", f"--model={GOLDEN.parent / 'llama3'}", "--windows=2", *flags]
    assert turboq([*words, "--window_length=16", f"--out={tmp_path}/o"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o" / "statistics").exists()
