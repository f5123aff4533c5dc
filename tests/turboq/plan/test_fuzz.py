"""2,000 damaged plans: each loads as exactly what it says, or is one clear error.

Half of the trials put the hashes right again after the damage, so that it reaches the checks behind
them; of the others none may load as anything but the original plan.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import plan_cases
import plan_mutations
import pytest
import safetensors.numpy
from unchecked import unchecked

from turboq.errors import TurboqError
from turboq.plan import document, load, save
from turboq.plan.document import plan_hash

TRIALS = 1_000  # tests/fuzz.py makes as many as one has time for


class Folder:
    """A saved plan that can be damaged and put back, in place."""

    def __init__(self, path: Path, case):
        self.path = path
        self.plan = save(*case, path)
        self.json = (path / "plan.json").read_bytes()
        self.side = (path / "plan.safetensors").read_bytes()
        self.document = json.loads(self.json)
        self.tensors = safetensors.numpy.load(self.side)
        self.current = self.json, self.side

    def put(self, text: bytes, side: bytes) -> None:
        for name, new, old in zip(
            ("plan.json", "plan.safetensors"), (text, side), self.current, strict=True
        ):
            if new != old:
                with open(self.path / name, "r+b") as f:  # in place: many times faster
                    f.write(new)
                    f.truncate()
        self.current = text, side


def outcome(folder: Folder) -> tuple[dict, dict[str, np.ndarray]] | None:
    """The loaded plan as a document and its arrays, or None after one clear error."""
    try:
        plan, arrays = load(folder.path)
    except TurboqError as error:
        message = str(error)
        assert message.startswith(str(folder.path / "plan.json: "))
        assert "\n" not in message
        assert message.isprintable()
        assert len(message) < len(str(folder.path)) + 450
        return None
    return document(plan), arrays


def trial(folder: Folder, rng: np.random.Generator) -> str:
    text, side = folder.json, folder.side
    doc, kind, honest = folder.document, int(rng.integers(10)), bool(rng.integers(2))
    if kind < 5:  # structure
        doc = plan_mutations.mutate(doc, rng)
        if rng.integers(4) == 0:
            doc = plan_mutations.mutate(doc, rng)
    elif kind == 5:  # bytes of the JSON
        text = plan_mutations.damage(text, rng)
    elif kind == 6:
        text = plan_mutations.repeat_key(text.decode(), rng).encode()
    elif kind == 7:  # bytes of the side file
        side = plan_mutations.damage(side, rng)
    elif kind == 8:
        side = plan_mutations.damage_header(side, rng)
    else:  # values of the side file
        raw = np.frombuffer(side, np.uint8).copy()
        at = len(raw) - 4 - 4 * int(rng.integers(sum(t.size for t in folder.tensors.values())))
        values = (np.nan, np.inf, -1.0, 1e30, 0.25, -0.0)
        raw[at : at + 4] = np.frombuffer(np.float32(plan_mutations.pick(rng, values)), np.uint8)
        side = raw.tobytes()
    if kind < 5 or (kind >= 7 and honest):
        if honest and isinstance(doc, dict):
            doc = dict(doc)
            if side is not folder.side:
                sha256 = hashlib.sha256(side).hexdigest()
                doc["arrays"] = doc["arrays"] | {"sha256": sha256, "size": len(side)}
            doc["hash"] = plan_hash(doc)
        text = json.dumps(doc).encode()
    folder.put(text, side)
    found = outcome(folder)
    if found is None:
        return "refused"
    loaded, arrays = found
    if not honest:
        assert loaded == folder.document
        assert side == folder.side
    assert loaded == json.loads(text)
    tensors = safetensors.numpy.load(side)  # an independent reader
    assert arrays.keys() == {name for name in tensors if not name.startswith("tables/")}
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, tensors[name])
    return "same" if loaded == folder.document and side == folder.side else "other"


@pytest.mark.parametrize("seed", range(2))
def test_damaged_plans_load_as_what_they_say_or_not_at_all(tmp_path, seed):
    rng = np.random.default_rng([20261122, seed])
    cases = (plan_cases.plain, plan_cases.rich)
    folders = [Folder(tmp_path / make.__name__, make()) for make in cases]
    count = dict.fromkeys(("refused", "same", "other"), 0)
    with unchecked():
        for i in range(TRIALS):
            count[trial(folders[i % 2], rng)] += 1
    # Most damage is refused; some only changes what the plan may say freely (names, notes).
    assert count["refused"] > 0.7 * sum(count.values())
    assert min(count.values()) > 10, count
    for folder in folders:  # and the folder itself still works
        folder.put(folder.json, folder.side)
        assert outcome(folder) is not None
