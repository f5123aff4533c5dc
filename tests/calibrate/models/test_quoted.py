"""Whatever stands in a file, an error about it is one line of a readable length."""

import contextlib
import itertools
import json

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, copy_of, parts_of, write

from turboq.errors import TurboqError
from turboq_calibrate.models import gguf_header
from turboq_calibrate.models.gguf_file import GGUFFile
from turboq_calibrate.models.hf import HFFolder
from turboq_calibrate.what_fits.read_geometry import read_geometry

F32 = gguf.GGMLQuantizationType.F32
LONG = "x" * 5000
WRONG = [LONG, [LONG] * 99, {LONG: {LONG: [LONG]}}, 10**4000, -(10**4000), [[[[[0] * 99] * 9]]]]


def test_what_errors_quote_of_a_configuration_is_short(tmp_path):
    folder = copy_of(tmp_path, "llama3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_scaling": config["rope_parameters"], "quantization_config": None}
    for key, wrong in itertools.product([*config, "sliding_window", "auto_map"], WRONG):
        for changed in (
            config | {key: wrong},
            config | {"rope_parameters": config["rope_parameters"] | {key: wrong}},
            config | {"quantization_config": {"quant_method": wrong}},
        ):
            (folder / "config.json").write_text(json.dumps(changed))
            for read in (HFFolder, read_geometry):
                with contextlib.suppress(TurboqError):
                    short(read, folder)


def test_what_errors_quote_of_a_gguf_file_is_short(tmp_path):
    fields = [name for name in parts_of("qwen3")[1] if not name.startswith("tokenizer")]
    assert len(fields) > 8
    for key in [*fields, "qwen3.rope.scaling.type", "qwen3.rope.other", "split.no", "split.count"]:
        for wrong in (LONG, [LONG] * 9):
            path = write(tmp_path / "m.gguf", fields={key: wrong})
            for read in (GGUFFile, read_geometry):
                with contextlib.suppress(TurboqError):
                    short(read, path)
    for names in (
        {LONG: (np.ones(3, np.float32), F32)},
        {"y" * 63 + LONG: (np.ones(3, np.int8), None)},
    ):
        with pytest.raises(TurboqError, match=r"has no place"):
            short(GGUFFile, write(tmp_path / "m.gguf", tensors=names))
    bad = b"\xff" * 4000
    raw = (GOLDEN / "qwen3" / "model.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:24] + len(bad).to_bytes(8, "little") + bad + raw[24:])
    with pytest.raises(TurboqError, match="a name is not UTF-8"):
        short(gguf_header.read, path)


def short(read, path):
    """Calls `read`; an error it raises is one line of a readable length."""
    try:
        return read(path)
    except TurboqError as error:
        message = str(error)
        if "\n" in message or len(message) > 3 * len(str(path)) + 500:
            raise AssertionError(f"{len(message)} characters: {message[:1000]}") from error
        raise
