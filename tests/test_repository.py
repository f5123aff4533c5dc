"""Hygiene that matters: import direction, file size, top level, and what must not exist."""

import ast
import fnmatch
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "turboq": ROOT / "turboq",
    "turboq_kernels": ROOT / "kernels" / "turboq_kernels",
    "turboq_calibrate": ROOT / "calibrate" / "turboq_calibrate",
}
MODELS_AND_FLAGS = {"absl", "flax", "optax", "orbax", "matplotlib", "rich", "tokenizers", "gguf"}
FORBIDDEN = {
    "turboq": {*MODELS_AND_FLAGS, "torch", "transformers", "turboq_kernels", "turboq_calibrate"},
    "turboq_kernels": {*MODELS_AND_FLAGS, "torch", "transformers", "turboq_calibrate"},
    "turboq_calibrate": {"torch", "transformers", "experiments", "tests"},
}
ELSEWHERE = PACKAGES["turboq_calibrate"] / "hf" / "capture.py"
# Sources that `turboq export --engine=transformers` hands out: nothing here imports them.
HANDED_OUT = {"transformers_cache", "transformers_codecs"}
TOP_LEVEL = {
    *("turboq", "kernels", "calibrate", "experiments", "tests", "scripts", "docs", ".ci"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".gitignore"),
    *("mkdocs.yml", "pyproject.toml", "constraints.txt", "constraints-newest.txt"),
}


def imported(source: str) -> set[str]:
    """Top-level names of every absolute import, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_imported_sees_every_form():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    from i import j\n"
    assert imported(source) == {"a", "c", "d", "i"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    # One program runs where torch is, by itself (tests/calibrate/observe/test_captured.py).
    files = sorted(f for f in PACKAGES[package].rglob("*.py") if f != ELSEWHERE)
    assert files
    assert not any(f"import {name}" in f.read_text() for f in files for name in HANDED_OUT)
    files = [file for file in files if file.stem not in HANDED_OUT]
    found = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := imported(file.read_text()) & FORBIDDEN[package])
    }
    assert found == {}


def test_no_file_is_longer_than_600_lines():
    files = [
        file
        for folder in ("turboq", "kernels", "calibrate", "experiments", "tests", "scripts")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and (file.suffix == ".py" or file.parent.name == "scripts")
    ]
    assert len(files) > 20
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > 600} == {}


def test_top_level_is_exactly_what_the_readme_shows():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    entries = {
        entry
        for entry in os.listdir(ROOT)
        if entry != ".git" and not any(fnmatch.fnmatch(entry, pattern) for pattern in ignored)
    }
    assert entries == TOP_LEVEL


def test_plain_folders_are_not_packages():
    # A top-level package called `kernels` would shadow the one that transformers imports.
    for folder in ("kernels", "calibrate", "experiments", "tests", "tests/turboq"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


SCRIPTS = ("bootstrap", "demo", "docs", "screenshots", "test")


@pytest.mark.parametrize("script", [*(f"scripts/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_are_strict_and_executable(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_pin_every_dependency_and_differ_only_in_jax():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned, newest = pins("constraints.txt"), pins("constraints-newest.txt")
    names = {name.lower().replace("_", "-") for name in pinned}
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["aot"] + extras["docs"]
    for requirement in wanted:
        name = requirement.partition(">=")[0].partition("[")[0].lower().replace("_", "-")
        assert name in names, requirement
    changed = {
        name for name in pinned.keys() | newest.keys() if pinned.get(name) != newest.get(name)
    }
    assert changed == {"jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin", "libtpu"}
