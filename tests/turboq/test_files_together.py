"""Files that are replaced together, folders that change names, and what killed writers leave."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from turboq import files
from turboq.errors import TurboqError

ROOT = Path(__file__).resolve().parents[2]
OLD = {"a.csv": b"old a", "b.json": b"old b", "c.json": b"old c"}
NEW = {"a.csv": b"new a", "b.json": b"new b", "c.json": b"new c"}
KILL = """
    import os, sys
    from pathlib import Path
    from turboq.files import write_together

    seen, at = 0, int(sys.argv[2])

    def watched(call):
        def run(*args, **kwargs):
            global seen
            seen += 1
            if seen > at:
                os.kill(os.getpid(), 9)
            return call(*args, **kwargs)
        return run

    for name in ("mkdir", "fdopen", "fsync", "chmod", "replace", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    write_together(Path(sys.argv[1]), {n: n[0].join(["new ", ""]) for n in sys.argv[3:]})
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OLD}


def age(folder: Path) -> None:
    """What lies here was written two hours ago."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 7200))


def test_killed_between_any_two_changes_all_are_old_or_all_new(tmp_path):
    found = []
    for at in range(40):
        folder = tmp_path / str(at)
        folder.mkdir()
        files.write_together(folder, OLD)
        assert sorted(os.listdir(folder)) == sorted(OLD)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILL), folder, str(at), *NEW],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        files.settle(folder)
        assert contents(folder) in (OLD, NEW)
        found.append(contents(folder) == NEW)
        age(folder)
        files.write_together(folder, NEW)  # and the next run clears what is left
        assert sorted(os.listdir(folder)) == sorted(NEW)
        assert contents(folder) == NEW
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert len(found) > 10
    assert found == sorted(found)  # the old ones up to one moment, the new ones from there on
    assert not found[0]
    assert found[-2]


def test_a_whole_set_waits_for_a_folder_that_can_be_written(tmp_path, monkeypatch):
    files.write_together(tmp_path, OLD)
    (tmp_path / files.COMPLETE).mkdir()
    (tmp_path / files.COMPLETE / "a.csv").write_bytes(b"new a")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refused)
        with pytest.raises(TurboqError, match=r"cut off on their way .*Permission denied"):
            files.settle(tmp_path)
    files.settle(tmp_path)
    assert contents(tmp_path) == OLD | {"a.csv": b"new a"}


def test_a_failure_keeps_the_old_files(tmp_path, monkeypatch):
    files.write_together(tmp_path, OLD)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TurboqError, match="No space left"):
        files.write_together(tmp_path, NEW)
    assert contents(tmp_path) == OLD
    assert sorted(os.listdir(tmp_path)) == sorted(OLD)


def test_only_what_an_old_writer_of_the_same_file_left_is_cleared(tmp_path):
    names = [
        ".x.json.abcdefgh.partial",
        ".y.json.abcdefgh.partial",
        ".x.json.original",
        "x.json.partial",
    ]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".x.json.folder.partial" / "deep").mkdir(parents=True)
    files.atomic_write(tmp_path / "x.json", "young ones may have a writer")
    assert set(os.listdir(tmp_path)) == {*names, ".x.json.folder.partial", "x.json"}
    age(tmp_path)
    files.atomic_write(tmp_path / "x.json", "new")
    assert set(os.listdir(tmp_path)) == {*names[1:], "x.json"}


@pytest.mark.parametrize("system", ["one step", "two steps"])
def test_folders_change_names(tmp_path, monkeypatch, system):
    if system == "two steps":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.exchange(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path / "old") == ["new"]
    assert os.listdir(tmp_path / "new") == ["old"]
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
