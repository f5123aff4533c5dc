"""plan.json and plan.safetensors on disk: all or nothing, although they are two files.

Two files cannot be replaced at once, so saving goes through a third name:

    1. write   plan.<first 16 hex of its sha256>.safetensors
    2. replace plan.json, which holds that sha256            <- the new plan is there from here on
    3. rename  the file of step 1 to plan.safetensors

`load` takes the side file with the hash that the JSON states: plan.safetensors, or, when a save was
cut off between 2 and 3, the file of step 1. Cut off at any point, either the old plan or the
new one loads, whole. The next save clears away what was left. One writer per folder.
"""

# pyright: strict

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turboq.files import atomic_write, make_folder
from turboq.plan import tensors
from turboq.plan.document import document, parse, pretty
from turboq.plan.errors import PlanConflict, PlanError
from turboq.plan.strict import MAX_JSON_BYTES, parse_json
from turboq.plan.types import ArrayFile, Plan

JSON_NAME = "plan.json"
ARRAYS_NAME = "plan.safetensors"
LADDER_NAME = "ladder.json"  # of `turboq.plan.ladder`
MAX_ARRAY_BYTES = 4 << 30
# Spare side files, and temporary files of `atomic_write`, of saves that were cut off.
_LEFT_OVER = re.compile(
    r"plan\.[0-9a-f]{16}\.safetensors|\.plan\.(json|[0-9a-f]{16}\.safetensors)\.[a-z0-9_]{8}(\.partial)?"
)


def save(plan: Plan, arrays: Mapping[str, Any], folder: str | os.PathLike[str]) -> Plan:
    """Writes `plan.json` and `plan.safetensors` to `folder`, which is created if need be.

    Returns the plan as it will load, with the side file's name, size and hash in `arrays`.

    Raises:
      PlanError: the arrays are not the plan's.
      TurboqError: the folder cannot be written or the disk is full; an earlier plan stays intact.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> plan = turboq.uniform_plan(geometry, k=codec, v=codec)
      >>> saved = turboq.save(plan, {}, "my_plan")
      >>> loaded, arrays = turboq.load("my_plan")
      >>> loaded == saved, arrays
      (True, {})
    """
    fitted = tensors.check_arrays(plan, arrays)
    content = fitted | tensors.table_tensors(plan)
    raw = tensors.write_bytes(content)
    sha256 = hashlib.sha256(raw).hexdigest()
    spec = ArrayFile(file=ARRAYS_NAME, size=len(raw), sha256=sha256, tensors=tensors.specs(content))
    plan = dataclasses.replace(plan, arrays=spec)
    text = pretty(document(plan)) + "\n"
    parse(parse_json(text.encode()))  # what cannot be read back is not written
    folder = make_folder(folder)
    spare = folder / _spare_name(ARRAYS_NAME, sha256)
    try:
        atomic_write(spare, raw)
        _sync(folder)
        atomic_write(folder / JSON_NAME, text)
    except BaseException:
        if not _is_current(folder, sha256):
            with contextlib.suppress(OSError):
                spare.unlink()
        raise
    _sync(folder)
    try:
        os.replace(spare, folder / ARRAYS_NAME)
    except OSError as error:
        reason = f"cannot be replaced: {error.strerror or error}"
        raise PlanError(str(folder / ARRAYS_NAME), reason) from error
    _sync(folder)
    _clear_spares(folder)
    return plan


def load(path: str | os.PathLike[str]) -> tuple[Plan, tensors.Tensors]:
    """The plan and its fitted arrays from a folder with `plan.json`, or from a JSON file.

    Everything is checked: see `turboq.plan.document.parse` and `turboq.plan.tensors`.

    Raises:
      PlanError: one line that names the file, the field or tensor, and what is wrong.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> plan = turboq.uniform_plan(geometry, k=codec, v=codec)
      >>> saved = turboq.save(plan, {}, "my_plan")
      >>> plan, arrays = turboq.load("my_plan")
      >>> plan.layers[0].k.codec.config()["codec"]
      'turboquant_mse'
    """
    path = Path(path)
    if is_ladder(path):
        raise PlanError(
            str(path), "is a ladder of plans: take one of them with `turboq plan --ladder=PATH "
            "--budget=...`"
        )  # fmt: skip
    path = path / JSON_NAME if path.is_dir() else path
    raw = read_file(path, MAX_JSON_BYTES)
    while True:
        try:
            return _load(path, raw)
        except PlanError as error:
            before, raw = raw, read_file(path, MAX_JSON_BYTES)
            if raw == before:  # otherwise it was being replaced meanwhile: look again
                raise error.in_file(str(path)) from None


def is_ladder(path: Path) -> bool:
    """Whether a folder holds a ladder and no plan, or a file is a ladder's JSON."""
    if path.is_dir():
        return (path / LADDER_NAME).is_file() and not (path / JSON_NAME).exists()
    return path.name == LADDER_NAME and path.is_file()


def _load(path: Path, raw: bytes) -> tuple[Plan, tensors.Tensors]:
    plan, stated = parse(parse_json(raw))
    assert plan.arrays is not None
    tensors.check_listing(plan, stated)
    content = _side_bytes(path.parent / plan.arrays.file, plan.arrays)
    try:
        found = tensors.read_bytes(content, plan.arrays.tensors)
    except PlanError as error:
        raise error.in_file(plan.arrays.file) from None
    fitted = {name: found[name] for name in tensors.array_shapes(plan)}
    arrays = tensors.check_arrays(plan, fitted)
    tensors.check_tables(plan, stated, found)
    return plan, arrays


def _side_bytes(side: Path, spec: ArrayFile) -> bytes:
    spare = side.with_name(_spare_name(side.name, spec.sha256))
    problem = PlanConflict("arrays.file", f"{side.name} is missing in the same folder")
    for candidate in (side, spare):
        if not candidate.exists():
            continue
        raw = read_file(candidate, MAX_ARRAY_BYTES)
        if hashlib.sha256(raw).hexdigest() != spec.sha256:
            what = f"{candidate.name} is not the file that was saved with this plan"
            problem = PlanConflict("arrays.sha256", f"{what} (cut off, damaged or exchanged)")
        elif len(raw) != spec.size:
            problem = PlanConflict("arrays.size", f"{spec.size}, but {side.name} has {len(raw)}")
        else:
            return raw
    raise problem


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes, in one piece."""
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as f:
            info = os.fstat(fd)
            regular = stat.S_ISREG(info.st_mode)
            raw = f.read() if regular and info.st_size <= limit else b""
    except FileNotFoundError:
        raise PlanError(str(path), "no such plan: write one with `turboq plan`") from None
    except OSError as error:
        raise PlanError(str(path), f"cannot be read: {error.strerror or error}") from None
    if not regular:
        raise PlanError(str(path), "is not a regular file")
    if info.st_size > limit:
        raise PlanError(str(path), f"{info.st_size} bytes exceed the limit {limit}")
    return raw


def _spare_name(name: str, sha256: str) -> str:
    return f"{name.removesuffix('.safetensors')}.{sha256[:16]}.safetensors"


def _is_current(folder: Path, sha256: str) -> bool:
    """The folder's JSON already names that side file, so it must stay."""
    with contextlib.suppress(OSError):
        return sha256.encode() in (folder / JSON_NAME).read_bytes()
    return False


def _clear_spares(folder: Path) -> None:
    for found in folder.iterdir():
        if _LEFT_OVER.fullmatch(found.name):
            with contextlib.suppress(OSError):
                found.unlink()


def _sync(folder: Path) -> None:
    """Makes renames in a folder durable, in order, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
