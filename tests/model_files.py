"""Golden model files copied and changed, and what their refusal must look like."""

import functools
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from turboq.errors import TurboqError
from turboq_calibrate.models import load_model

GOLDEN = Path(__file__).parent / "golden"


def copy_of(tmp_path, family):
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    return folder


def refuses(path, *fragments):
    """Loading ends with one line that holds every fragment."""
    with pytest.raises(TurboqError) as caught:
        load_model(path)
    message = str(caught.value)
    for fragment in fragments:
        assert str(fragment) in message
    assert "\n" not in message


def rewrite(folder, change, file="model.safetensors"):
    """Passes a checkpoint's tensors through `change`."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


@functools.cache
def parts_of(family):
    """Metadata fields and tensors of a golden GGUF file, to be written again with a change."""
    reader = gguf.GGUFReader(GOLDEN / family / "model.gguf")
    fields = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    return str(reader.fields["general.architecture"].contents()), fields, tensors


def write(path, family="qwen3", *, arch=None, fields=None, tensors=None, **split):
    """A golden GGUF file with fields and tensors added, replaced, or (None) left out.

    `split` is the writer's own (`split_max_tensors`): NAME.gguf becomes NAME-00001-of-0000N.gguf.
    """
    original, old_fields, old_tensors = parts_of(family)
    writer = gguf.GGUFWriter(path, arch or original, **split)
    for name, (value, types) in old_fields.items():
        if name not in (fields or {}):
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, value in (fields or {}).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    for name, (value, kind) in (old_tensors | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
