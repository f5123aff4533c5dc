"""What `fuzz.py` reads: for every kind of file a corpus made here, its damage, and its readers.

A target is a function that fills an empty folder and returns the case: given a generator of random
numbers, damage something and read it. It returns when the damage was read as a value, and raises
the project's own error when it was refused; anything else is a fault.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import codec_rows
import model_files
import numpy as np
import plan_cases
import plan_mutations
import quality_cases
import stat_cases
from plan_mutations import pick

from turboq.codecs import Exact, from_config
from turboq.errors import TurboqError
from turboq.export import engine, export
from turboq.plan import collect_arrays, load, save, summary, uniform_plan
from turboq.plan.document import plan_hash
from turboq.plan.geometry import MAX_DIM
from turboq_calibrate.cli.inspect import describe
from turboq_calibrate.measure.html_page import render
from turboq_calibrate.measure.quality_table import read_quality, write_quality
from turboq_calibrate.models import load_model
from turboq_calibrate.models.tokenizer import from_folder
from turboq_calibrate.observe import statistics_files
from turboq_calibrate.observe.manifest import Inputs
from turboq_calibrate.tasks.results import format_results, read_results, write_results
from turboq_calibrate.what_fits.read_geometry import read_geometry

Case = Callable[[np.random.Generator], None]
Files = dict[str, bytes]

NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32, 64, 128, 256, 1000, 1024, 4096, 8192, 2**20)
NUMBERS += (2**31, 2**53 - 1, -1, -8)
TEXTS = ("haar", "hadamard", "walsh", "gaussian", "sphere", "orthogonal", "float32", "token", "x")
SEGMENTS = ([[8, 8]], [[8, 8]] * 4, [[8, 1]] * 100, [[2**30, 3]], [[]], [[8]], [["a", 2]], [])
NESTED: Any = [1]
for _ in range(200):
    NESTED = [NESTED]
WIDE = (10**4000, -(10**4000), NESTED, "x" * 5000, "\x1b[31m\u202e", {"y" * 5000: 1}, ["z"] * 5000)
WIDE += (float("nan"), float("inf"), 1e308, -0.0, 2**63, -(2**63), 2**64)
PASSAGE = "Naïve café:\n  3.14 + 2 = 5.14 \U0001f600 end"
SPECIAL = (np.nan, np.inf, -np.inf, -1.0, 1e30, 1e-45, -0.0)


def damaged(name: str, raw: bytes, rng: np.random.Generator) -> bytes:
    """One file's bytes with damage of a kind that its format makes likely to get far."""
    kind = int(rng.integers(8))
    if kind == 0:
        return plan_mutations.damage(raw, rng)
    if name.endswith(".json"):
        return damaged_json(raw, rng)
    if name.endswith(".gguf"):
        return overwritten(raw, min(len(raw), 8192), rng)
    if kind < 5:
        return plan_mutations.damage_header(raw, rng)
    if kind < 7:
        return overwritten(raw, 16, rng)
    return special_values(raw, rng)


def damaged_json(raw: bytes, rng: np.random.Generator) -> bytes:
    kind = int(rng.integers(8))
    if kind == 0:
        return plan_mutations.repeat_key(json.dumps(json.loads(raw)), rng).encode()
    document = plan_mutations.mutate(json.loads(raw), rng)
    if kind == 1 and any(plan_mutations.containers(document)):
        document = plan_mutations.mutate(document, rng)
    elif kind == 2:
        document = widened(document, rng)
    return json.dumps(document).encode()


def widened(document: Any, rng: np.random.Generator) -> Any:
    """A value somewhere replaced by one that is far too large, deep or long."""
    some = [c for c in plan_mutations.containers(document) if c]
    if not some:
        return pick(rng, WIDE)
    at = pick(rng, some)
    at[pick(rng, list(at) if isinstance(at, dict) else range(len(at)))] = pick(rng, WIDE)
    return document


def overwritten(raw: bytes, within: int, rng: np.random.Generator) -> bytes:
    """Numbers of 1 to 8 bytes among the first `within` replaced, as lengths and types are."""
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 3))):
        size = int(pick(rng, (1, 4, 8)))
        at = int(rng.integers(max(within - size, 1)))
        value = int(pick(rng, (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
        out[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(out)


def special_values(raw: bytes, rng: np.random.Generator) -> bytes:
    """A number of a safetensors file's data replaced; the header stays."""
    (header,) = struct.unpack("<Q", raw[:8])
    count = (len(raw) - 8 - header) // 4
    if count < 1:
        return raw
    at = len(raw) - 4 * (1 + int(rng.integers(count)))
    return raw[:at] + np.float32(pick(rng, SPECIAL)).tobytes() + raw[at + 4 :]


class Folder:
    """Files in a folder: one is damaged, read, and put back.

    honest: makes hashes fit the damage again, so that it reaches the checks behind them.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], Any],
        *,
        only: tuple[str, ...] = (),
        honest: Callable[[Files, str], Files] | None = None,
        damage: Callable[[str, bytes, np.random.Generator], bytes] = damaged,
    ):
        self.path, self.read, self.honest, self.damage = path, read, honest, damage
        self.files = {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}
        self.names = only or tuple(self.files)
        read(path)  # what is not damaged is not refused

    def __call__(self, rng: np.random.Generator) -> None:
        name = pick(rng, self.names)
        changed = self.files | {name: self.damage(name, self.files[name], rng)}
        if self.honest is not None and rng.integers(4):
            changed = self.honest(changed, name)
        different = [name for name, raw in changed.items() if raw != self.files[name]]
        try:
            for name in different:
                (self.path / name).write_bytes(changed[name])
            self.read(self.path)
        finally:
            for name in different:
                (self.path / name).write_bytes(self.files[name])


def golden(path: Path, family: str, *names: str) -> Path:
    path.mkdir()
    for name in names:
        shutil.copyfile(model_files.GOLDEN / family / name, path / name)
    return path


def several(*cases: Case) -> Case:
    return lambda rng: pick(rng, cases)(rng)


def plan(folder: Path) -> Case:
    def honest(files: Files, name: str) -> Files:
        try:
            document = json.loads(files["plan.json"])
            side = files["plan.safetensors"]
            document["arrays"] |= {"sha256": hashlib.sha256(side).hexdigest(), "size": len(side)}
            document["hash"] = plan_hash(document)
        except (ValueError, TypeError, KeyError, TurboqError):
            return files  # damaged beyond a hash
        return files | {"plan.json": json.dumps(document).encode()}

    def read(path: Path) -> None:
        summary(load(path)[0])

    for make in (plan_cases.plain, plan_cases.rich):
        save(*make(), folder / make.__name__)
    return several(*(Folder(path, read, honest=honest) for path in sorted(folder.iterdir())))


def codec(folder: Path) -> Case:
    """Descriptions with fields replaced, mostly by something of the same type; all is then built.

    A head of a plan has at most 1024 channels; larger ones are described but not built.
    """
    known = [row.make(dim).config() for row in codec_rows.ROWS.values() for dim in (64, 128)]

    def case(rng: np.random.Generator) -> None:
        config = dict(pick(rng, known))
        for _ in range(int(rng.integers(1, 4))):
            key = pick(rng, [k for k in config if k != "codec"])
            kinds = {int: NUMBERS, str: TEXTS, tuple: SEGMENTS, list: SEGMENTS}
            same = kinds.get(type(config[key]))
            pool = same if same and rng.integers(8) else (*plan_mutations.JUNK, *WIDE)
            config[key] = pick(rng, pool)
        found = from_config(config)
        assert found.fields
        assert found.bits_per_vector > 0
        assert found.array_shapes is not None
        assert found.reading is None or found.reading.width > 0
        if found.dim <= MAX_DIM:
            assert all(np.isfinite(x).all() for x in found.tables.values())

    return case


def safetensors(folder: Path) -> Case:
    one = golden(folder / "one", "llama3", "config.json", "tokenizer.json", "model.safetensors")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "model.safetensors.index.json"
    split = golden(folder / "split", "qwen3", "config.json", index, *shards)
    return several(
        Folder(one, weights, only=("model.safetensors",)),
        Folder(split, weights, only=(*shards, index)),
    )


def weights(path: Path) -> None:
    """All of a model's weights, and what they take."""
    model = load_model(path, resident=False)
    for i in range(len(model.spec.layers)):
        model.source.layer(i)
    model.source.embed()
    model.source.head()
    read_geometry(path)


def gguf(folder: Path) -> Case:
    families = ("llama3", "qwen3", "gemma2", "mixtral")
    raw = [(model_files.GOLDEN / family / "model.gguf").read_bytes() for family in families]
    path = folder / "model.gguf"

    def case(rng: np.random.Generator) -> None:
        at = int(rng.integers(len(families)))
        if rng.integers(3):
            path.write_bytes(damaged(path.name, raw[at], rng))
        else:  # one field of metadata, of whatever type
            fields = sorted(model_files.parts_of(families[at])[1])
            usable = [j for j in plan_mutations.JUNK if isinstance(j, bool | str)]
            numbers = (*range(9), 255, 2**31, 0.5, -1e30, float("nan"))
            value = pick(rng, (*usable, *numbers, ["a", "b"], [1, 2], [0.5]))
            model_files.write(path, families[at], fields={pick(rng, fields): value})
        read_geometry(path)
        weights(path)
        if model_files.GOLDEN / families[at] / "tokenizer.json":
            load_model(path, resident=False).tokenizer.encode(PASSAGE)

    return case


def gguf_split(folder: Path) -> Case:
    """One of three parts damaged, or another part's bytes under its name."""
    own = folder / "split"
    own.mkdir()
    model_files.write(own / "m.gguf", "qwen3", split_max_tensors=12)
    parts = [path.read_bytes() for path in sorted(own.iterdir())]

    def damage(name: str, raw: bytes, rng: np.random.Generator) -> bytes:
        return damaged(name, raw, rng) if rng.integers(4) else pick(rng, parts)

    def read(path: Path) -> None:
        for part in sorted(path.iterdir()):
            read_geometry(part)
        weights(min(path.iterdir()))

    return Folder(own, read, damage=damage)


def config(folder: Path) -> Case:
    def read(path: Path) -> None:
        read_geometry(path / "config.json")
        describe(str(path), 32768)

    families = ("llama3", "qwen2_window", "gemma3", "gemma3_vision", "qwen3_moe", "mixtral")
    cases = []
    for family in families:
        path = golden(folder / family, family, "config.json", "model.safetensors")
        cases.append(Folder(path, read, only=("config.json",)))
    return several(*cases)


# Configurations of kinds that no golden checkpoint is of; small, as only their cache is counted.
_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "hidden_size": 64}
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M*-E",
     "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1,
     "conv_kernel": 4, "mamba_ssm_cache_dtype": "bfloat16", **_HEADS},
    {"model_type": "falcon_h1", "num_hidden_layers": 4, "mamba_d_ssm": 64, "mamba_d_state": 16,
     "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_n_heads": 2, "mamba_d_head": 32, **_HEADS},
    {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "linear_num_key_heads": 2,
     "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
     "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "bfloat16", **_HEADS},
    {"model_type": "deepseek_v3", "num_hidden_layers": 3, "kv_lora_rank": 512,
     "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, **_HEADS},
    {"model_type": "minimax_m1", "num_hidden_layers": 4, "attn_type_list": [0, 0, 0, 1], **_HEADS},
    {"model_type": "dbrx", "d_model": 512, "n_heads": 16, "n_layers": 3,
     "attn_config": {"kv_n_heads": 4}},
    {"model_type": "nemotron-nas", "num_hidden_layers": 2, "block_configs": [
        {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": {"no_op": True}},
        {"attention": {"n_heads_in_group": None, "no_op": True}}],
     **_HEADS, "num_key_value_heads": None},
    {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512,
     "layer_types": ["sliding_attention"] * 6 + ["full_attention"], **_HEADS},
)  # fmt: skip


def geometry(folder: Path) -> Case:
    cases = []
    for document in GEOMETRIES:
        path = folder / document["model_type"]
        path.mkdir()
        (path / "config.json").write_text(json.dumps(document))
        cases.append(Folder(path, read_geometry))
    return several(*cases)


def tokenizer(folder: Path) -> Case:
    def read(path: Path) -> None:
        found = from_folder(path)
        found.decode(found.encode(PASSAGE))

    settings = ("config.json", "generation_config.json")
    path = golden(folder / "llama3", "llama3", "tokenizer.json", *settings)
    return Folder(path, read, only=("tokenizer.json", "tokenizer.json", settings[1]))


def statistics(folder: Path) -> Case:
    manifest = statistics_files.MANIFEST

    def honest(files: Files, name: str) -> Files:
        if name == manifest:
            return files
        document = json.loads(files[manifest])
        entries = [document["windows"], *document["layers"]]
        entries += [entry["tokens"] for entry in document["layers"]]
        for entry in entries:
            raw = files[entry["file"]]
            entry |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        return files | {manifest: json.dumps(document).encode()}

    path = folder / "statistics"
    path.mkdir()
    stat_cases.write_folder(path)
    return Folder(path, stat_cases.use, honest=honest)


def inputs(folder: Path) -> Case:
    """What an unfinished observation says of itself."""
    from turboq.plan.json_file import read_json

    path = folder / "observe"
    path.mkdir()
    (path / "inputs.json").write_text(json.dumps(stat_cases.INPUTS))
    return Folder(path, lambda p: read_json(p / "inputs.json", Inputs, otherwise="remove it"))


def quality(folder: Path) -> Case:
    rows = [quality_cases.row(name, text=text) for text in ("a", "b") for name in ("one", "two")]
    write_quality(quality_cases.quality(rows, ("a", "b")), folder)
    whole = {name: (folder / name).read_bytes() for name in ("quality.json", "run.json")}

    def read(path: Path) -> None:
        found = read_quality(path)
        # Drawing takes a second: only what was read in spite of damage is drawn, and not each time.
        now = [(path / name).read_bytes() for name in whole]
        if now != list(whole.values()) and hashlib.sha256(b"".join(now)).digest()[0] < 16:
            render(found)

    return Folder(folder, read, only=tuple(whole))


def task_results(folder: Path) -> Case:
    write_results(quality_cases.task_results(), folder)
    return Folder(folder, lambda path: format_results(read_results(path)), only=("tasks.json",))


def exported(folder: Path) -> Case:
    """The report of an earlier export, which says whether the folder may be replaced."""
    exact = Exact(dim=16, dtype="bfloat16")
    made = uniform_plan(plan_cases.geometry(v_dim=16), k=exact, v=exact)
    arrays, exporter = collect_arrays(made, lambda *_: {}), engine("llama.cpp")
    out = folder / "out"

    def read(path: Path) -> None:
        export(made, arrays, exporter, path)

    read(out)
    return Folder(out, read, only=("export_report.json",))


TARGETS: dict[str, Callable[[Path], Case]] = {
    "plan": plan,
    "codec": codec,
    "safetensors": safetensors,
    "gguf": gguf,
    "gguf_split": gguf_split,
    "config": config,
    "geometry": geometry,
    "tokenizer": tokenizer,
    "statistics": statistics,
    "inputs": inputs,
    "quality": quality,
    "tasks": task_results,
    "export": exported,
}


def planted(folder: Path) -> Case:
    """Not a target of its own: faults at random, by which tests see that each kind is noticed."""

    def bug() -> None:
        raise KeyError("a bug")

    def long() -> None:
        raise TurboqError("x" * 5000)

    def unprintable() -> None:
        error = TurboqError()
        error.args = ("a value of \x1b[31m colour",)  # past what escapes it
        raise error

    def slow() -> None:
        until = time.process_time() + 0.6
        while time.process_time() < until:
            pass

    def hang() -> None:
        time.sleep(60)

    def abort() -> None:
        faulthandler.disable()
        os.abort()

    return lambda rng: pick(rng, (bug, long, unprintable, slow, hang, abort))()
