"""`README.md` of this folder: every kind of fault names a test that exists."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def names_in(path: Path) -> set[str]:
    """Names of the tests that pytest collects from a file; without importing it."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows() -> list[list[str]]:
    lines = (HERE / "README.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_kind_has_a_test_that_exists():
    found = rows()
    assert len(found) > 40
    for kind, protected, test in found:
        named = NAMED.fullmatch(test)
        assert all((kind, protected, named)), (kind, test)
        path = HERE / named[1]
        assert path.is_file(), test
        assert named[2] in names_in(path), test


def test_no_kind_and_no_test_is_named_twice():
    for column in (0, 2):
        cells = [row[column] for row in rows()]
        assert len(set(cells)) == len(cells)
