"""Where the TPU and GPU compilers are, and the processes that compile with them.

The TPU compiler is the package libtpu; the GPU compiler is jax-cuda13-plugin with jax-cuda13-pjrt
(together the extra `aot`). JAX loads every plugin it sees when it starts, on any machine, so
scripts/bootstrap installs them beside site-packages, in the folder `compilers` of the environment:
only the processes started here look there. Installed into site-packages they are found as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

import turboq
import turboq_kernels

# By platform: what shows that its compiler is there, and what installs it.
_MARKS = {
    "tpu": "libtpu/__init__.py",
    "cuda": "jax_plugins/xla_cuda13/__init__.py",
    "rocm": "jax_plugins/xla_rocm7/__init__.py",
}
_PACKAGES = {
    "tpu": "libtpu",
    "cuda": f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}",
    "rocm": f"jax-rocm7-pjrt=={jax.__version__}",
}
_NAMES = {"tpu": "TPU", "cuda": "GPU", "rocm": "AMD GPU"}
# Of the schedules that libtpu can write, those that are read (all would be 700 MB a kernel).
_SCHEDULES = "final_bundles|final_hlo-static-per-bundle-utilization|pre-finalize-registers.*"


def folder(platform: str = "cuda") -> pathlib.Path:
    """Where scripts/bootstrap puts the compilers of this environment; AMD's it does not install."""
    return pathlib.Path(sys.prefix) / ("compilers-amd" if platform == "rocm" else "compilers")


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for "tpu", "cuda" or "rocm" here, or None."""
    places = (folder(platform), *map(pathlib.Path, sys.path))
    if any((place / _MARKS[platform]).is_file() for place in places):
        return None
    return (
        f"the {_NAMES[platform]} compiler is not installed: "
        f"pip install --no-deps --target {folder(platform)} {_PACKAGES[platform]}"
    )


def environment(**more: str) -> dict[str, str]:
    """Environment of a process that compiles: it sees the compilers, and looks for no device.

    What the caller tells XLA to leave out is not passed on: it would change the costs.
    """
    sources = [pathlib.Path(package.__path__[0]).parent for package in (turboq, turboq_kernels)]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = dict.fromkeys([*map(str, sources), *given, str(folder())])
    return os.environ | more | {
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip


class Program(NamedTuple):
    """What is compiled: a function, the shapes of its arguments, which of them are donated."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()

    @property
    def jitted(self):
        return jax.jit(self.function, donate_argnums=self.donated)


def abstractly(device: AbstractDevice):
    """A context in which programs are traced for such a device, which is not here."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(program: Program, platform: str, device: AbstractDevice) -> str:
    """What a compiler would get, without places in the source: equal text compiles to equal code.

    Needs no compiler.
    """
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    jax.config.update(limit, 0)
    try:
        with abstractly(device):
            traced = program.jitted.trace(*program.arguments)
            return traced.lower(lowering_platforms=(platform,)).as_text()
    finally:
        jax.config.update(limit, before)


def version(platform: str) -> str:
    """Of the compiler that `missing` looks for.

    Raises:
      RuntimeError: the compiler is missing.
    """
    _require(platform)
    name = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "rocm": "jax-rocm7-pjrt"}[platform]
    (found, *_) = importlib.metadata.distributions(
        name=name, path=[str(folder(platform)), *sys.path]
    )
    return f"{name} {found.version}"


def printed(program: str, platform: str) -> str:
    """What a Python program printed that may compile for the platform.

    Raises:
      RuntimeError: the compiler is missing, or the program failed (a bad kernel may abort it).
    """
    _require(platform)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling for {platform} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def select(only: Sequence[str], among: Sequence[Any], **known: str) -> list[Any]:
    """The configurations that meet all conditions like "bits=3".

    Args:
      known: what holds for every configuration beside its own fields.

    Raises:
      ValueError: none does; the message says what a name may be.
    """
    wanted = conditions(only)
    fields = [known | dataclasses.asdict(c) for c in among]
    for name, value in wanted.items():
        if not any(name in own for own in fields):
            names = ", ".join(dict.fromkeys(name for own in fields for name in own))
            raise ValueError(f"no configuration has {name}={value}: it has {names}")
        values = dict.fromkeys(str(own[name]) for own in fields if name in own)
        if value not in values:
            every = " or ".join(values)
            raise ValueError(f"no configuration has {name}={value}: {name} is {every}")
    found = [
        c for c, own in zip(among, fields, strict=True)
        if all(name in own and str(own[name]) == x for name, x in wanted.items())
    ]  # fmt: skip
    if not found:
        raise ValueError(f"no configuration has {' and '.join(only)} at once")
    return found


def conditions(only: Sequence[str]) -> dict[str, str]:
    """Conditions like "bits=3" by name.

    Raises:
      ValueError: one is none.
    """
    pairs = [condition.partition("=") for condition in only]
    for condition, (name, equals, value) in zip(only, pairs, strict=True):
        if not (name and equals and value):
            raise ValueError(f"{condition!r} must be a condition like bits=3")
    return {name: value for name, _, value in pairs}


def rows(module: str, platform: str, configurations: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Costs of the configurations, one by one as they are compiled, in one process of their own.

    Args:
      module: its `main` (below) prints them.

    Raises:
      RuntimeError: the compiler is missing, or failed at the configuration that is named (it may
        abort its process).
    """
    _require(platform)
    named = json.dumps([dataclasses.asdict(c) for c in configurations])
    with (
        tempfile.TemporaryDirectory() as dump,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, "--these", dump], text=True,
            env=environment(LIBTPU_INIT_ARGS=_dumping(dump)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(named)
            printed = (line for line in process.stdout if line.startswith('{"'))
            for configuration in configurations:
                line = next(printed, None)
                if line is None:
                    process.wait()
                    errors.seek(0)
                    raise RuntimeError(
                        f"compiling {configuration} failed:\n{errors.read()[-4000:]}"
                    )
                yield json.loads(line)
        finally:
            process.kill()


def main(
    arguments: Sequence[str],
    kind: type,
    row: Callable[[Any, pathlib.Path], dict[str, Any]],
    rows: Callable[[Sequence[str]], Iterator[dict[str, Any]]],
) -> None:
    """The program of a module of costs: all rows that match, or with --these those on stdin.

    `row` gets an empty folder, into which libtpu writes its schedules.

    Raises:
      SystemExit: no row matches; says why.
    """
    if arguments[:1] != ["--these"]:
        try:
            found = rows(arguments)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        print(json.dumps(list(found), indent=1))
        return
    dump = pathlib.Path(arguments[1])
    for fields in json.load(sys.stdin):
        print(json.dumps(row(kind(**fields), dump)), flush=True)
        for file in dump.iterdir():
            file.unlink()


def _dumping(dump: str) -> str:
    return (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex={_SCHEDULES}"
    )


def _require(platform: str) -> None:
    reason = missing(platform)
    if reason is not None:
        raise RuntimeError(reason)
