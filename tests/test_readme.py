"""The pages' Python examples (below a `<!-- tested -->` mark) and notebooks run; links lead on.

Links between pages, to a #part of them too, are also checked by `./scripts/docs`.
"""

import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot

import turboq

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "golden" / "llama3"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"<!-- tested -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    )
]
NOTEBOOKS = {path.name: json.loads(path.read_text()) for path in ROOT.glob("notebooks/*.ipynb")}
MADE = {f"docs/reference/{name}.md" for name in ("turboq", "turboq_kernels", "turboq_calibrate")}


def test_every_python_block_is_tested():
    assert len(BLOCKS) == sum(page.read_text().count("```python\n") for page in PAGES) > 3


@pytest.mark.parametrize("code", BLOCKS)
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What an example registers is gone after it.
    monkeypatch.setattr(turboq.CODECS, "_found", dict(turboq.CODECS._found))
    # A tiny checkpoint stands in for the embedded model: the same calls, in seconds.
    code = code.replace('"embedded"', repr(str(TINY)))
    exec(compile(code, "block", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    """All cells in their order, on a tiny checkpoint; and no output is committed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    space = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"]).replace('"embedded"', repr(str(TINY)))
        exec(compile(code, f"{name}, cell {number}", "exec"), space)
    pyplot.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" in link and "127.0.0.1" not in link]
    missing = [
        link
        for link in links
        if not (target := (page.parent / link).resolve()).exists()
        and target.relative_to(ROOT).as_posix() not in MADE
    ]
    assert missing == []


def test_the_readme_is_read_in_two_minutes():
    # 250 words a minute; a table or a command is looked at, not read.
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^\|.*$|^```.*?^```|\]\([^)]*\)", "", text, flags=re.M | re.S)
    assert len(prose.split()) < 500
