"""The README's Python examples run as they stand (those below a `<!-- tested -->` mark)."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
TINY = README.parent / "tests" / "golden" / "llama3"
BLOCKS = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_every_python_block_is_tested():
    assert len(BLOCKS) == README.read_text().count("```python\n") > 0


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_block_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A tiny checkpoint stands in for the embedded model: the same calls, in seconds.
    code = BLOCKS[index].replace('"embedded"', repr(str(TINY)))
    exec(compile(code, f"README block {index}", "exec"), {"__name__": "readme"})
