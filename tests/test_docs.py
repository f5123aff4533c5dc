"""The documentation site builds strictly: links and their #parts, names, nothing from a network."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_and_has_every_public_name(tmp_path):
    # `scripts/docs` without its environment: this one is the same.
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path]
    made = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference" / "turboq.html").read_text()
    assert 'id="turboq.codecs.TurboQuantMSE"' in page
    assert "2**bits" in page  # no Markdown in formulas
    command = (tmp_path / "reference" / "command.html").read_text()
    assert "usage: turboq calibrate" in command
    assert "--windows" in command
    # Opened as files, pages search an index that is a script, through a worker of our own.
    assert (tmp_path / "search" / "search_index.js").exists()
    assert '<script src="../iframe-worker.js"></script>' in command
    assert (tmp_path / "iframe-worker.js").exists()
    assert (tmp_path / "repository" / "experiments" / "results" / "demo.json").exists()
