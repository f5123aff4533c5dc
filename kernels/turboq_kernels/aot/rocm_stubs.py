"""Empty libraries in place of ROCm's, so that XLA's compiler for AMD can be loaded without them.

Its plugin names them as needed, and looks for them beside itself too (`rocm/lib`). One stub has
every function, which says that there is no device; the others are there by name. Needs gcc and the
binutils nm and readelf.
"""

from __future__ import annotations

import pathlib
import re
import subprocess

PLUGIN = "jax_plugins/xla_rocm7/xla_rocm_plugin.so"
_SYSTEM = re.compile(r"lib(c|m|rt|dl|pthread|gcc_s|stdc\+\+)\.so|ld-linux")
_NO_DEVICE = 100  # hipErrorNoDevice


def make(folder: pathlib.Path) -> pathlib.Path:
    """The plugin below `folder`, its libraries made if they are not there.

    Raises:
      subprocess.CalledProcessError: a tool failed; what it said is on stderr.
    """
    plugin, stubs = folder / PLUGIN, folder / "rocm" / "lib"
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _said("readelf", "-d", str(plugin)))
    own = [name for name in needed if not _SYSTEM.match(name)]
    if all((stubs / name).is_file() for name in own):
        return plugin
    stubs.mkdir(parents=True, exist_ok=True)
    # Without versions of symbols a library may not be the one that a version is asked of, so the
    # functions are in one that has none to offer.
    (whole,) = (name for name in own if name.startswith("librocblas"))
    for name in own:
        _library(stubs / name, source(undefined(plugin)) if name == whole else "")
    return plugin


def undefined(plugin: pathlib.Path) -> list[str]:
    """Functions that the plugin takes from ROCm: those that no system library has a version of."""
    out = []
    for line in _said("nm", "-D", "--undefined-only", str(plugin)).splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if kind == "U" and not re.match(r"@?(GLIBC|GLIBCXX|GCC|CXXABI)_", version):
            out.append(name)
    return out


def source(names: list[str]) -> str:
    """C of functions that fail; those that return text, by their names, return none."""
    text = re.compile("string|name", re.IGNORECASE)
    return "".join(
        f'const char *{name}(void) {{ return ""; }}\n'
        if text.search(name)
        else f"long {name}(void) {{ return {_NO_DEVICE}; }}\n"
        for name in names
    )


def _library(path: pathlib.Path, code: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run([*command, f"-Wl,-soname,{path.name}"], input=code, text=True, check=True)


def _said(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
