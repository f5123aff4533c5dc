"""Manifests of a statistics folder that disagree: each is named (random damage: `fuzz.py`)."""

import copy
import json

import numpy as np
import pytest
import stat_cases
from safetensors import numpy as st_numpy
from stat_cases import use

from turboq.errors import TurboqError
from turboq_calibrate.observe import statistics_files as files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics")
    stat_cases.write_folder(out)
    return out


def test_the_folder_itself_loads(folder):
    assert "layers: 2" in use(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["windows"].update(m["layers"][0]["tokens"]), "g_k is float32"),
        (lambda m: m["layers"].pop(), "layers: 1, but the geometry has 2"),
        (lambda m: m["layers"][0].update(k=[2, 8]), r"layers\[0\].*k_before"),
        (lambda m: m["layers"].reverse(), r"layers\[0\]: is not the geometry's layer"),
        (lambda m: m["layers"][1].update(file="../x"), r"layers\[1\]\.file: .*plain name"),
        (lambda m: m["inputs"]["text"].update(windows=5), "inputs.text.*windows.*texts have 4"),
        (lambda m: m["inputs"].pop("recipe"), "inputs.recipe: missing"),
    ],
)
def test_what_disagrees_is_named(folder, change, message):
    path = folder / files.MANIFEST
    whole = path.read_bytes()
    document = copy.deepcopy(json.loads(whole))
    change(document)
    path.write_text(json.dumps(document))
    try:
        with pytest.raises(TurboqError, match=message):
            use(folder)
    finally:
        path.write_bytes(whole)


def test_windows_of_another_shape_are_refused(folder):
    path, where = folder / files.MANIFEST, folder / files.WINDOWS
    whole, old = path.read_bytes(), where.read_bytes()
    document = json.loads(whole)
    try:
        where.write_bytes(st_numpy.save({"tokens": np.zeros((1, 2), np.int32)}))
        document["windows"] = files._describe_file(where)
        path.write_text(json.dumps(document))
        with pytest.raises(TurboqError, match=r"tokens is int32\[1, 2\]"):
            use(folder)
    finally:
        path.write_bytes(whole)
        where.write_bytes(old)
