"""The wheel: builds, installs beside transformers, and works from outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "turboq", "kernels", "calibrate")


def run(*command: str | os.PathLike[str], cwd: Path) -> str:
    # No PYTHONPATH: only the installed wheel may answer the imports.
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=keep, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Built from a copy: setuptools leaves build/ and *.egg-info beside what it builds.
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source),
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel installed and this one's packages, but not this source."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    purelib = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    # A plain path line: .pth files of that folder (the editable turboq) are not processed.
    (purelib / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=folder,
    )
    return python


def test_wheel_holds_the_three_packages_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"turboq", "turboq_kernels", "turboq_calibrate"}
    assert [name.partition("-")[0] for name in info] == ["turboq_jax"]  # as turboq-jax is written
    for package in ("turboq", "turboq_kernels", "turboq_calibrate"):
        assert f"{package}/py.typed" in names
    assert "turboq/plan.schema.json" in names
    for folder, package in (
        (ROOT / "turboq", "turboq"),
        (ROOT / "kernels" / "turboq_kernels", "turboq_kernels"),
        (ROOT / "calibrate" / "turboq_calibrate", "turboq_calibrate"),
    ):
        files = [f for kind in ("*.py", "*.json") for f in folder.rglob(kind)]
        assert {f"{package}/{f.relative_to(folder).as_posix()}" for f in files} <= names


PROBE = """
import importlib.resources as resources, importlib.util, json, pathlib, sys
import turboq, turboq_kernels, turboq_calibrate
import turboq_calibrate.cli.main
from transformers.utils.import_utils import is_kernels_available  # may `import kernels`
from transformers.models.llama.configuration_llama import LlamaConfig
schema = json.loads((resources.files("turboq") / "plan.schema.json").read_text())
places = [pathlib.Path(m.__file__) for m in (turboq, turboq_kernels, turboq_calibrate)]
print(json.dumps({
    "inside": all(p.is_relative_to(sys.prefix) for p in places),
    "version": turboq.__version__,
    "schema": schema["$schema"],
    "kernels": [is_kernels_available(), importlib.util.find_spec("kernels") is not None],
    "layers": LlamaConfig(num_hidden_layers=3).num_hidden_layers,
}))
"""


def test_imports_outside_the_repository_beside_transformers(python, tmp_path):
    import turboq

    seen = json.loads(run(python, "-c", PROBE, cwd=tmp_path).splitlines()[-1])
    assert seen["inside"]
    assert seen["version"] == turboq.__version__
    assert seen["schema"].startswith("https://json-schema.org/")
    assert seen["kernels"] == [False, False]
    assert seen["layers"] == 3


def test_console_script_of_the_wheel(python, tmp_path):
    out = run(python.parent / "turboq", "--help", cwd=tmp_path)
    assert "calibrate" in out
    assert "evaluate" in out


def test_transformers_is_not_misled_at_the_repository_root():
    # The folder kernels/ is on sys.path here and must not pass for the package `kernels`, which
    # transformers imports names from when it believes that it is installed.
    code = (
        "from transformers.models.llama.configuration_llama import LlamaConfig\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available())"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == "False"
