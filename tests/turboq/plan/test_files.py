"""plan.json and plan.safetensors as a pair: damage, exchange, interruption, hostile files."""

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import plan_cases
import pytest
import safetensors.numpy

from turboq import plan as plans
from turboq.codecs import TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import PlanError, load, save
from turboq.plan import io as plan_io
from turboq.plan.document import plan_hash

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path) -> Path:
    save(*plan_cases.rich(), tmp_path / "plan")
    return tmp_path / "plan"


def refused(path) -> str:
    """The message of the one error."""
    with pytest.raises(TurboqError) as info:
        load(path)
    message = str(info.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, change, *, side: bytes | None = None) -> None:
    """Changes the document and makes its hashes right again: only `change` is wrong."""
    doc = json.loads((folder / "plan.json").read_text())
    if side is not None:
        (folder / "plan.safetensors").write_bytes(side)
        doc["arrays"]["sha256"] = hashlib.sha256(side).hexdigest()
        doc["arrays"]["size"] = len(side)
    change(doc)
    doc["hash"] = plan_hash(doc)
    (folder / "plan.json").write_text(json.dumps(doc))


def rewrite_tensors(folder: Path, change) -> None:
    """Changes the tensors and lists and hashes them as they are."""
    found = safetensors.numpy.load((folder / "plan.safetensors").read_bytes())
    change(found)

    def relist(doc):
        doc["arrays"]["tensors"] = {
            n: {"dtype": t.dtype.name, "shape": list(t.shape)} for n, t in found.items()
        }

    rewrite(folder, relist, side=safetensors.numpy.save(found))


def test_the_side_file_is_plain_safetensors(folder):
    """Another engine needs no turboq: tables are there, once each, in float32."""
    found = safetensors.numpy.load((folder / "plan.safetensors").read_bytes())
    doc = json.loads((folder / "plan.json").read_text())
    assert {n: list(t.shape) for n, t in found.items()} == {
        n: spec["shape"] for n, spec in doc["arrays"]["tensors"].items()
    }
    used = {name for use in doc["tables"] for name in use["tensors"].values()}
    assert used == {name for name in found if name.startswith("tables/")}
    tables = [t.tobytes() for n, t in found.items() if n.startswith("tables/")]
    assert len(set(tables)) == len(tables)
    codec = TurboQuantMSE(dim=16, bits=3, rotation="haar", seed=7)
    (use,) = [use for use in doc["tables"] if use["codec"] == codec.config()]
    for table, name in use["tensors"].items():
        np.testing.assert_array_equal(found[name], codec.tables[table].astype(np.float32))


def test_missing_and_unreadable_files(folder, tmp_path):
    assert refused(tmp_path / "none").endswith("no such plan: write one with `turboq plan`")
    assert "no such plan" in refused(tmp_path)
    (tmp_path / "dir.json").mkdir()
    assert "no such plan" in refused(tmp_path / "dir.json")
    os.mkfifo(tmp_path / "plan.json")  # must not wait for a writer
    assert "plan.json: is not a regular file" in refused(tmp_path)
    (folder / "plan.safetensors").unlink()
    assert "arrays.file: plan.safetensors is missing in the same folder" in refused(folder)
    (folder / "plan.safetensors").mkdir()
    assert "plan.safetensors: cannot be read: Is a directory" in refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files(folder, keep):
    side, doc = folder / "plan.safetensors", folder / "plan.json"
    whole = side.read_bytes()
    side.write_bytes(whole[:keep])
    assert "arrays.sha256: plan.safetensors is not the file that was saved" in refused(folder)
    rewrite(folder, lambda doc: doc["arrays"].update(size=len(whole)), side=whole[:keep])
    assert f"arrays.size: {len(whole)}, but plan.safetensors has" in refused(folder)
    rewrite(folder, lambda doc: None, side=whole[:keep])
    due = "cannot hold the 8144 listed" if keep >= 0 else "not a whole safetensors file"
    assert due in refused(folder)
    doc.write_bytes(doc.read_bytes()[:keep])
    assert "not JSON" in refused(folder)


def test_one_flipped_bit_anywhere_in_the_arrays(folder):
    side = folder / "plan.safetensors"
    raw = bytearray(side.read_bytes())
    for at in range(0, len(raw), 997):
        raw[at] ^= 1
        side.write_bytes(raw)
        assert "arrays.sha256" in refused(folder)
        raw[at] ^= 1


def drop(name):
    return lambda found: found.pop(name)


def swap(name, change):
    return lambda found: found.update({name: change(found[name].copy())})


def nudge(x):
    x.flat[0] += 1e-4
    return x


MEAN = "layers.0.k.heads.0.mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(MEAN), f'arrays.tensors: "{MEAN}" is missing'),
        (drop("tables/rotation.0"), 'arrays.tensors: "tables/rotation.0" is missing'),
        (lambda f: f.update(more=np.zeros(3, np.float32)), 'arrays.tensors: "more" is not needed'),
        (swap(MEAN, lambda x: x[:-1]), "shape [15] must be [16]"),
        (swap(MEAN, lambda x: x[None]), "shape [1, 16] must be [16]"),
        (
            swap(MEAN, lambda x: x.astype(np.float16)),
            "dtype='float16' must be one of float32",
        ),
        (swap(MEAN, lambda x: x * np.nan), f"{MEAN}: 16 of 16 values are NaN"),
        (swap("tables/rotation.0", nudge), "tables/rotation.0: differs by 0.0001 from the table"),
        (swap("tables/codebook.0", nudge), "tables/codebook.0: differs by 0.0001"),
        (swap("tables/codebook.0", lambda x: x * np.nan), "tables/codebook.0: differs by nan"),
        (swap("tables/rotation.0", lambda x: x[:8]), "tables/rotation.0: shape [8, 16] must be"),
    ],
)
def test_wrong_tensors_with_right_hashes(folder, change, message):
    rewrite_tensors(folder, change)
    assert message in refused(folder)


def test_json_and_tensors_must_agree_although_hashes_are_right(folder):
    def shape(doc):
        doc["arrays"]["tensors"][MEAN]["shape"] = [4, 4]

    rewrite(folder, shape)
    assert f'arrays.tensors["{MEAN}"]: shape [4, 4] must be [16]' in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(), '"tables/rotation.5" is not needed (1 in all)'),
        (lambda t: t.append(t[0]), "tables[6].codec: is not in use, or was listed before"),
        (lambda t: t.reverse(), 'tables[0].codec: must be {"codec": "per_head", "dim": 16, "bi'),
        (lambda t: t[0]["codec"].update(seed=1), "tables[0].codec: must be"),
        (lambda t: t[2]["tensors"].update(rotation="tables/none"), '"tables/none" is missing'),
        (lambda t: t[2]["tensors"].update(rotation=MEAN), '"tables/rotation.2" is not needed'),
        (lambda t: t[2].update(tensors={}), '"tables/rotation.2" is not needed'),
        (lambda t: t[2]["tensors"].update(mine=MEAN), 'tables[2].tensors: "mine" is not needed'),
        (lambda t: t[2]["tensors"].update(rotation=1), "tables[2].tensors.rotation: 1 must be a"),
    ],
)
def test_tables_must_be_those_of_the_codecs_in_use(folder, change, message):
    rewrite(folder, lambda doc: change(doc["tables"]))
    assert message in refused(folder)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "side",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        header({}) + b"more",
        header(
            {MEAN: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}, b"0" * 64
        ),
        header({MEAN: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        header({MEAN: {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        header({MEAN: {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}, b"0" * 64),
        header({MEAN: []}),
    ],
)
def test_malformed_safetensors(folder, side):
    rewrite(folder, lambda doc: doc["arrays"].update(size=10**6), side=side)
    rewrite(folder, lambda doc: doc["arrays"].update(size=len(side)))
    message = refused(folder)
    assert "plan.safetensors" in message or "arrays.size" in message


def test_a_huge_file_is_not_read(folder):
    with open(folder / "plan.safetensors", "r+b") as f:
        f.truncate(5 << 30)  # sparse
    assert "bytes exceed the limit" in refused(folder)
    with open(folder / "plan.json", "r+b") as f:
        f.truncate(1 << 30)
    assert "plan.json: 1073741824 bytes exceed the limit" in refused(folder)


def test_a_plan_being_replaced_while_it_is_read(folder, monkeypatch):
    """The reader has the old JSON and finds the new side file: it looks again."""
    new, arrays = plan_cases.plain()
    real, calls = plan_io.parse_json, []

    def parse_json(raw):
        calls.append(len(raw))
        if len(calls) == 1:
            monkeypatch.setattr(plan_io, "parse_json", real)
            save(new, arrays, folder)
        return real(raw)

    monkeypatch.setattr(plan_io, "parse_json", parse_json)
    loaded, found = load(folder)
    assert calls
    assert loaded.model == new.model
    assert found.keys() == arrays.keys()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_save_leaves_the_earlier_plan(folder, monkeypatch, fails_at):
    """Disk full at each step: the old plan loads and nothing is left behind."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real, calls = plan_io.atomic_write, []

    def atomic_write(path, data):
        calls.append(path.name)
        if len(calls) == fails_at:
            raise TurboqError(f"cannot write {path}: No space left on device")
        real(path, data)

    monkeypatch.setattr(plan_io, "atomic_write", atomic_write)
    with pytest.raises(TurboqError, match="No space left"):
        save(*plan_cases.plain(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert load(folder)[0].model.name == "all kinds"


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboqError, match="is a file"):
        save(*plan_cases.plain(), tmp_path / "file")


KILL = """
    import os, sys, warnings
    import plan_cases
    from turboq.plan import load, save

    folder = sys.argv[1]
    old, new = plan_cases.rich(), plan_cases.plain()

    def child(kill_at):
        # Dies, as by SIGKILL, just before the kill_at-th call that changes the disk.
        seen = 0

        def watched(call):
            def run(*args, **kwargs):
                nonlocal seen
                if seen == kill_at:
                    os._exit(9)
                seen += 1
                return call(*args, **kwargs)
            return run

        for name in ("replace", "fsync", "chmod", "unlink", "fdopen"):
            setattr(os, name, watched(getattr(os, name)))
        save(*new, folder)
        os._exit(0)

    results, at = [], 0
    while True:
        os.unlink(folder + "/plan.json") if at else None
        save(*old, folder)
        assert sorted(os.listdir(folder)) == ["plan.json", "plan.safetensors"], os.listdir(folder)
        pid = os.fork()
        if pid == 0:
            child(at)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        plan, arrays = load(folder)
        results.append(plan.model.name)
        due = new if plan.model == new[0].model else old
        assert plan.layers == due[0].layers and arrays.keys() == due[1].keys()
        if code == 0:
            break
        assert code == 9
        at += 1
    print(*results, sep=",")
"""


def test_killed_at_any_moment_one_whole_plan_loads(tmp_path):
    """Every point between two changes of the disk; then the next save clears what was left."""
    names = run_script(KILL, str(tmp_path)).strip().split(",")
    assert len(names) > 8
    assert names[0] == "all kinds"
    assert names[-1] == "tiny"
    changes = sum(a != b for a, b in itertools.pairwise(names))
    assert changes == 1  # the old plan up to one moment, the new one from there on


def test_loading_a_plan_imports_little(folder):
    code = """
        import sys
        from turboq.plan import load, summary
        print(summary(load(sys.argv[1])[0]))
        heavy = {"flax", "optax", "orbax", "transformers", "tokenizers", "gguf", "matplotlib",
                 "jsonschema", "rich", "turboq_calibrate", "turboq_kernels", "torch"}
        sys.exit(f"imported {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
    """
    assert "one token: 132 bytes" in run_script(code, str(folder))


def run_script(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_public_names():
    for name in ("Plan", "LayerPlan", "SidePlan", "uniform_plan", "save", "load", "check_model"):
        assert hasattr(plans, name)
    assert issubclass(PlanError, TurboqError)
