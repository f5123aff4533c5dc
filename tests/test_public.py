"""What is public: a docstring of the house form under every name, whose example runs."""

import ast
import doctest
import functools
import importlib
import inspect
import re
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

import turboq_calibrate

PACKAGES = ("turboq", "turboq_kernels", "turboq_calibrate")
TINY = Path(__file__).resolve().parent / "golden" / "llama3"
PUBLIC = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if name != "__version__"
]
# Annotations of arrays without a shape; our modules keep annotations as text.
BARE = {"Array", "jax.Array", "jnp.ndarray", "np.ndarray", np.ndarray}
# An error that a name raises itself, by the base it is documented as.
BASES = {
    "PlanConflict": ("PlanConflict", "PlanError"),
    "PlanError": ("PlanError", "TurboqError"),
    "RuntimeError": (),
}


def documented(found: object) -> str:
    """The docstring; of an object of a class, its class's."""
    return inspect.getdoc(found) or ""


def raised(source: str) -> set[str]:
    """Names of errors that a function, or a class where it is made, raises by itself."""
    (top,) = ast.parse(textwrap.dedent(source)).body
    if isinstance(top, ast.ClassDef):
        made = ("__init__", "__post_init__")
        bodies = [x for x in top.body if isinstance(x, ast.FunctionDef) and x.name in made]
    else:
        bodies = [top]
    found = set()
    for body in bodies:
        for node in ast.walk(body):
            if isinstance(node, ast.Raise) and node.exc is not None:
                error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if (name := ast.unparse(error).rpartition(".")[2])[0].isupper():
                    found.add(name)  # not an error that another function made
    return found


def missing(found: object, text: str) -> list[str]:
    """What the docstring lacks."""
    lines = text.splitlines()
    lacks = []
    if not lines or not re.search(r"[.:]$", lines[0]) or (lines[1:] and lines[1]):
        lacks.append("a first line that is one sentence, and an empty one below")
    if ">>>" not in text:
        lacks.append("an example")
    if isinstance(found, types.FunctionType | type):
        says = text.partition("Raises:")[2]
        for error in raised(inspect.getsource(found)):
            if not any(name in says for name in BASES.get(error, (error,))):
                lacks.append(f"Raises: {error}")
    return lacks + (untyped(found) if isinstance(found, types.FunctionType) else [])


def untyped(found: types.FunctionType) -> list[str]:
    """Parameters, and what is returned, without a type or an array's shape."""
    signature = inspect.signature(found)
    types_of = {name: x.annotation for name, x in signature.parameters.items()}
    types_of["what it returns"] = signature.return_annotation
    lacks = []
    for name, kind in types_of.items():
        if kind is signature.empty and name not in ("self", "cls"):
            lacks.append(f"a type of {name}")
        elif kind in BARE:
            lacks.append(f"a shape of {name}")
    return lacks


def members(found: object) -> dict[str, types.FunctionType]:
    """Public methods and properties that a class states, functions that a module does."""
    out = {}
    for name, value in vars(found).items():
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.cached_property):
            value = value.func
        value = inspect.unwrap(value) if callable(value) else value
        own = inspect.isclass(found) or getattr(value, "__module__", "") == found.__name__
        if isinstance(value, types.FunctionType) and own and not name.startswith("_"):
            out[name] = value
    return out


def test_what_is_missing_is_seen():
    def bare(x):
        raise KeyError(x)

    assert missing(bare, "") == [
        "a first line that is one sentence, and an empty one below",
        "an example",
        "Raises: KeyError",
        "a type of x",
        "a type of what it returns",
    ]
    good = "Does it.\n\nRaises:\n  KeyError: never.\n\n>>> 1\n"
    assert missing(bare, good) == ["a type of x", "a type of what it returns"]

    class Made:
        def __post_init__(self):
            raise TypeError(self)

        def later(self):
            raise KeyError(self)

        @property
        def width(self) -> np.ndarray: ...

    assert missing(Made, good) == ["Raises: TypeError"]
    assert set(members(Made)) == {"later", "width"}
    assert untyped(members(Made)["later"]) == ["a type of what it returns"]
    assert untyped(members(Made)["width"]) == ["a shape of what it returns"]

    def unsaid(x: np.ndarray) -> None: ...

    assert missing(unsaid, good) == ["a shape of x"]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda x: x)
def test_docstrings_have_the_needed_parts(package, name):
    found = getattr(importlib.import_module(package), name)
    assert missing(found, documented(found)) == []
    if inspect.isclass(found) or inspect.ismodule(found):
        own = members(found)
        assert [member for member in own if not inspect.getdoc(getattr(found, member))] == []
        assert {member: lacks for member, x in own.items() if (lacks := untyped(x))} == {}


def test_modules_of_public_names_are_strictly_typed():
    """pyright checks them strictly: the mark that it looks for is there."""
    loose = {
        module.__name__
        for package, name in PUBLIC
        if (module := inspect.getmodule(getattr(importlib.import_module(package), name)))
        and "# pyright: strict" not in inspect.getsource(module)
    }
    assert loose == set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples: what `calibrate` writes, the others read."""
    return tmp_path_factory.mktemp("examples")


FIRST = [("turboq_calibrate", "calibrate")]
REAL = turboq_calibrate.load_model
LOAD = functools.cache(lambda name: REAL(str(TINY)))


@pytest.mark.parametrize(
    ("package", "name"), [*FIRST, *(x for x in PUBLIC if x not in FIRST)], ids=lambda x: x
)
def test_examples_run(package, name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = documented(getattr(importlib.import_module(package), name))
    # A tiny checkpoint, loaded once, stands in for the embedded model: the same calls, in seconds.
    monkeypatch.setattr("turboq_calibrate.load_model", LOAD)
    example = doctest.DocTestParser().get_doctest(text, {}, f"{package}.{name}", None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries > 0


def test_a_renamed_name_works_and_says_where_it_is():
    import turboq_kernels
    from turboq_kernels.decode.api import decode

    with pytest.warns(DeprecationWarning, match=r"is turboq_kernels\.decode\.api\.decode now"):
        assert turboq_kernels.decode_attention is decode
    assert "decode_attention" not in dir(turboq_kernels)
    with pytest.raises(AttributeError, match="no attribute 'decode_attentoin'"):
        _ = turboq_kernels.decode_attentoin
