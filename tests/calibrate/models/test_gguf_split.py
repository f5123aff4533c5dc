"""Split GGUF files, as the gguf package writes them: any part is the whole model, bit for bit."""

import shutil

import numpy as np
import pytest
from model_files import GOLDEN, parts_of, refuses, write

from turboq.errors import TurboqError
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.what_fits.read_geometry import read_geometry

# With experts, latent attention, and layers without a cache among them.
FAMILIES = ("qwen3", "deepseek_v3", "granite_hybrid", "llama3")
TOTAL = "split.tensors.count"


def split(folder, family="qwen3", parts=3, **how):
    """Its parts, in order."""
    count = len(parts_of(family)[2])
    write(folder / "m.gguf", family, split_max_tensors=-(-count // parts), **how)
    found = sorted(folder.glob("m-*.gguf"))
    assert [path.name for path in found] == [
        f"m-{i + 1:05d}-of-{len(found):05d}.gguf" for i in range(len(found))
    ]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_any_part_is_the_whole_model(tmp_path, family):
    parts, whole = split(tmp_path, family), load_model(GOLDEN / family / "model.gguf")
    assert len(parts) == 3
    tokens = np.arange(12).reshape(2, 6) % whole.spec.vocab
    want = np.asarray(forward(whole, tokens)[0])
    for path, resident in ((parts[0], True), (parts[2], False)):
        model = load_model(path, resident=resident)
        assert model.spec.layers == whole.spec.layers
        assert model.source.files == parts
        np.testing.assert_array_equal(forward(model, tokens)[0], want)
    names = [load_model(path).spec.name for path in parts]
    assert names == ["m-00001-of-00003"] * 3
    assert len({load_model(path).fingerprint for path in parts}) == 1


def test_the_tokenizer_is_that_of_the_first_part(tmp_path):
    parts = split(tmp_path, "llama3")
    text = "The first part describes the model: 12 words, and none of the others do."
    want = load_model(GOLDEN / "llama3" / "model.gguf").tokenizer.encode(text)
    assert load_model(parts[1]).tokenizer.encode(text) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_reads_the_same_of_any_part(tmp_path, family):
    want = read_geometry(GOLDEN / family / "model.gguf")
    for path in split(tmp_path, family):
        found = read_geometry(path)
        assert (found.layers, found.weights_bytes) == (want.layers, want.weights_bytes)
        assert found.name == "m-00001-of-00003"


def test_a_first_part_without_tensors(tmp_path):
    parts = split(tmp_path, small_first_shard=True)
    whole = load_model(GOLDEN / "qwen3" / "model.gguf")
    for name, value in load_model(parts[0]).layer(1).items():
        np.testing.assert_array_equal(value, whole.layer(1)[name])


def test_one_part_of_one_is_a_whole_file(tmp_path):
    path = write(tmp_path / "m-00001-of-00001.gguf", fields={"split.no": 0, "split.count": 1})
    assert load_model(path).source.files == [path]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path, lost):
    parts = split(tmp_path)
    parts[lost].unlink()
    for path in parts:
        if path != parts[lost]:
            with pytest.raises(TurboqError) as caught:
                load_model(path)
            assert str(caught.value) == (
                f"{parts[lost]} is missing: all parts of a model lie in one folder"
            )
    if lost:  # the planner needs the first part alone, and says why weights are not known
        found = read_geometry(parts[0])
        assert found.weights_bytes is None
        assert str(parts[lost]) in found.weights_from
    else:
        with pytest.raises(TurboqError, match=r"00001-of-00003\.gguf is missing"):
            read_geometry(parts[1])


def test_parts_of_other_splits_are_refused(tmp_path):
    parts = split(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(parts[1], tmp_path / "kept.gguf")
    shutil.copy(parts[2], parts[1])  # one part twice
    refuses(parts[0], parts[1], "is not part 1 (from 0) of 3")
    shutil.copy(tmp_path / "kept.gguf", parts[1])
    load_model(parts[0])
    other = split(tmp_path / "other", tensors={"output_norm.weight": (None, None)})
    shutil.copy(other[2], parts[2])  # of a model of one tensor less
    count = len(parts_of("qwen3")[2])
    refuses(parts[0], f"says {TOTAL}=", f", but the 3 parts hold {count - 1}: one of", "another")


def test_a_tensor_of_two_parts_is_refused(tmp_path):
    own = {"split.count": 2, "split.no": 0}
    first = write(tmp_path / "m-00001-of-00002.gguf", fields=own)
    second = write(tmp_path / "m-00002-of-00002.gguf", fields=own | {"split.no": 1})
    refuses(first, second, "tensor blk.0.attn_k", "is in another part too")


def test_names_by_which_others_are_not_found(tmp_path):
    parts = split(tmp_path)
    for name in ("m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"):
        path = shutil.copy(parts[0], tmp_path / name)
        refuses(path, path, "is one of several files and not named NAME-00001-of-00002")
    for i, path in enumerate(parts[:2]):
        shutil.copy(path, tmp_path / f"n-{i + 1:05d}-of-00002.gguf")
    refuses(tmp_path / "n-00001-of-00002.gguf", "is one of 3 parts by split.count")


def test_damage_in_a_later_part_names_that_part(tmp_path):
    parts = split(tmp_path)
    raw = parts[2].read_bytes()
    parts[2].write_bytes(raw[: len(raw) - 40])
    refuses(parts[0], parts[2], "truncated")
    parts[2].write_bytes(raw)
    name = "output_norm.weight"
    held = [str(path) for path in parts if name.encode() in path.read_bytes()]
    bad = np.full(parts_of("qwen3")[2][name][0].shape, np.nan, np.float32)
    folder = tmp_path / "bad"
    folder.mkdir()
    again = split(folder, tensors={name: (bad, None)})
    refuses(again[0], str(folder / held[0].rpartition("/")[2]), name, "NaN")
