"""Folders of the Hugging Face hub's cache: models--ORG--NAME/snapshots/COMMIT holds a model."""

from __future__ import annotations

from pathlib import Path

PREFIX, SNAPSHOTS = "models--", "snapshots"


def model_name(folder: Path) -> str:
    """What a model in `folder` is called: NAME for a snapshot, else as the folder is."""
    folder = folder.resolve()
    root = folder.parent.parent
    if folder.parent.name == SNAPSHOTS and root.name.startswith(PREFIX):
        return root.name.removeprefix(PREFIX).split("--")[-1]
    return folder.name


def snapshot_hint(folder: Path) -> str:
    """ " (...)" with the snapshot to name instead of a cache's root; "" where there is none."""
    commit = folder / "refs" / "main"
    found = sorted(p.name for p in (folder / SNAPSHOTS).glob("*") if p.is_dir())
    if not found:
        return ""
    if commit.is_file() and (main := commit.read_text(errors="replace").strip()) in found:
        found = [main]
    return f" (a cache of the hub: give its snapshot {folder / SNAPSHOTS / found[-1]})"
