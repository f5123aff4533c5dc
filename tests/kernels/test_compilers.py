"""Where the compilers for other chips are looked for, and the process that runs one."""

import dataclasses
import importlib.util
import os
import sys

import pytest

from turboq_kernels.aot import compilers


@dataclasses.dataclass(frozen=True)
class Configuration:
    bits: int


# Every row leaves a file in the folder of schedules; the configuration with 0 bits is a bad kernel.
PROGRAM = """
import dataclasses, os, sys
from turboq_kernels.aot import compilers

@dataclasses.dataclass
class Configuration:
    bits: int

def row(c, dump):
    if c.bits == 0:
        print("no such register", file=sys.stderr, flush=True)
        os.abort()
    found = {"bits": c.bits, "before": len(list(dump.iterdir()))}
    (dump / "schedule.txt").write_text("")
    return found

print("a line of the compiler's")
compilers.main(sys.argv[1:], Configuration, row, lambda only: iter([{"only": only}]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of compilers that holds neither, beside a path that has none."""
    monkeypatch.setattr(compilers, "folder", lambda platform="cuda": tmp_path)
    monkeypatch.setattr(sys, "path", [])
    return tmp_path


def install(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")


def test_missing(folder, monkeypatch):
    assert f"--target {folder} libtpu" in str(compilers.missing("tpu"))
    assert f"--target {folder} jax-cuda13-plugin==" in str(compilers.missing("cuda"))
    with pytest.raises(RuntimeError, match="the TPU compiler is not installed"):
        next(compilers.rows("any", "tpu", [Configuration(1)]))
    with pytest.raises(RuntimeError, match="the GPU compiler is not installed"):
        compilers.printed("print(1)", "cuda")
    install(folder, "libtpu", "jax_plugins/other")
    assert compilers.missing("tpu") is None
    assert compilers.missing("cuda") is not None
    install(folder / "site", "jax_plugins/xla_cuda13")  # beside JAX, by turboq-jax[aot]
    monkeypatch.setattr(sys, "path", [str(folder / "site")])
    assert compilers.missing("cuda") is None


def test_environment(folder, monkeypatch):
    """The compilers come last: nothing in there hides what the caller imports."""
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    seen = compilers.environment(MORE="1")
    assert seen["PYTHONPATH"].split(os.pathsep)[-2:] == ["before", str(folder)]
    assert (seen["JAX_PLATFORMS"], seen["XLA_FLAGS"], seen["MORE"]) == ("cpu", "", "1")
    assert seen["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"


def test_rows_come_one_by_one_and_an_abort_names_its_configuration(folder):
    install(folder, "libtpu")
    (folder / "costs_of_a_fake.py").write_text(PROGRAM)
    configurations = [Configuration(3), Configuration(2), Configuration(0), Configuration(4)]
    rows = compilers.rows("costs_of_a_fake", "tpu", configurations)
    assert next(rows) == {"bits": 3, "before": 0}
    assert next(rows) == {"bits": 2, "before": 0}
    with pytest.raises(RuntimeError, match=r"(?s)compiling Configuration\(bits=0\).*no such regis"):
        next(rows)
    assert not list(compilers.rows("costs_of_a_fake", "tpu", []))


def test_what_a_program_prints(folder):
    install(folder, "libtpu")
    assert compilers.printed("import libtpu; print(libtpu.__file__)", "tpu").startswith(str(folder))
    with pytest.raises(RuntimeError, match=r"(?s)compiling for tpu failed.*ZeroDivisionError"):
        compilers.printed("1 / 0", "tpu")


def test_plain_python_sees_no_compiler():
    """JAX would load them at every start: in an environment of scripts/bootstrap they are apart."""
    if not compilers.folder().is_dir():
        pytest.skip("not an environment of ./scripts/bootstrap dev")
    assert importlib.util.find_spec("libtpu") is None
    plugins = importlib.util.find_spec("jax_plugins")
    places = plugins.submodule_search_locations if plugins else None
    assert not [name for place in places or [] for name in os.listdir(place)]
