"""--weights=auto: what is added up is what a loader reads, and a missing file is named."""

import shutil

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, copy_of, write

from turboq.errors import TurboqError
from turboq.what_fits import weights_bytes
from turboq_calibrate.what_fits.read_geometry import read_geometry

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
WHOLE = sum((GOLDEN / "qwen3" / name).stat().st_size for name in SHARDS)


@pytest.fixture
def folder(tmp_path):
    return copy_of(tmp_path, "qwen3")


def unknown(path, why):
    """The geometry is read all the same; only --weights=auto is refused."""
    found = read_geometry(path)
    assert found.weights_bytes is None
    with pytest.raises(TurboqError, match=why) as caught:
        weights_bytes(found, "auto")
    assert "--weights_gib" in str(caught.value)


def test_what_the_index_names_is_counted_and_nothing_else(folder):
    shutil.copyfile(folder / SHARDS[0], folder / "consolidated.safetensors")
    found = read_geometry(folder)
    assert (found.weights_bytes, found.weights_from) == (
        WHOLE, "3 files that model.safetensors.index.json names",
    )  # fmt: skip
    (folder / SHARDS[1]).unlink()
    unknown(folder, f"qwen3: {SHARDS[1]} is missing; name a type")


def test_without_an_index_a_series_must_be_whole(folder):
    (folder / "model.safetensors.index.json").unlink()
    found = read_geometry(folder)
    assert (found.weights_bytes, found.weights_from) == (WHOLE, "3 files")
    shutil.copyfile(folder / SHARDS[0], folder / "consolidated.safetensors")
    unknown(folder, r"may be a copy|not named NAME-00001-of-00002")
    (folder / "consolidated.safetensors").unlink()
    (folder / SHARDS[2]).unlink()
    unknown(folder, f"{SHARDS[2]} is missing")


def test_one_file_and_its_copy(tmp_path):
    folder = copy_of(tmp_path, "llama3")
    size = (folder / "model.safetensors").stat().st_size
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert read_geometry(folder).weights_bytes == size
    (folder / "model.safetensors").unlink()
    found = read_geometry(folder)
    assert (found.weights_bytes, found.weights_from) == (size, "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    unknown(folder, "no weight files were seen")


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_is_said_and_the_geometry_read(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    unknown(folder, r"index\.json")


def part(path, number, count, rows):
    """A further part of a GGUF file: no description of the model, one tensor."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.kv_data[0].clear()
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_tensor(f"part{number}", np.ones((rows, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_all_parts_of_a_gguf_file_are_added_up(tmp_path):
    alone = read_geometry(GOLDEN / "qwen3" / "model.gguf")
    assert alone.weights_from == "the tensors of model.gguf"
    first = write(tmp_path / "m-00001-of-00003.gguf", fields={"split.no": 0, "split.count": 3})
    part(tmp_path / "m-00002-of-00003.gguf", 1, 3, 4)
    unknown(first, "m-00003-of-00003.gguf is missing")
    part(tmp_path / "m-00003-of-00003.gguf", 2, 3, 2)
    found = read_geometry(first)
    assert found.weights_bytes == alone.weights_bytes + (4 + 2) * 8 * 4
    assert found.weights_from == "the tensors of all 3 parts of m-00001-of-00003.gguf"
    part(tmp_path / "m-00003-of-00003.gguf", 1, 3, 2)
    unknown(first, r"m-00003-of-00003.gguf is not part 2 \(from 0\) of 3")
    renamed = first.rename(tmp_path / "first.gguf")
    unknown(renamed, "not named NAME-00001-of-00002")
    other = renamed.rename(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "m-00002-of-00002.gguf")
    unknown(other, "is one of 3 parts by split.count")
