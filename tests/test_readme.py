"""The pages' Python examples (below a `<!-- tested -->` mark) and notebooks run, their commands
parse, and links lead on.

Links between pages, to a #part of them too, are also checked by `./scripts/docs`.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from matplotlib import pyplot

import turboq
from turboq import words
from turboq.export import ENGINES
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.cli import common
from turboq_calibrate.cli import main as cli

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
NOTEBOOKS = {
    path.name: json.loads(path.read_text()) for path in ROOT.glob("docs/notebooks/*.ipynb")
}
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


def commands(page: Path) -> list[list[str]]:
    """Words behind `turboq` of every command in a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in split if line and Path(line[0]).name == "turboq"]


def understood(argv: list[str]):
    """The flags of a command as it reads them, the words of those that are lists too."""
    module = cli._module(argv[0])
    values = cli._define(module)
    assert cli._parse(argv[0], module, values, argv) is not None
    for flag in ("baselines", "choose"):
        for item in common.listed(values, flag) if flag in values else []:
            if not item.startswith("my_codecs."):  # of the page on codecs from outside
                words.parse(item)
    if "codec" in values and values["codec"].present:
        words.parse(values.codec)
    if "budget" in values and values.budget is not None:
        assert Budget.parse_range(values.budget) or Budget.parse(values.budget)
    if "engine" in values and values.engine is not None:
        assert values.engine in ENGINES
    if argv[0] == "plan":
        module._check(values)
    return values


OF_A_MODEL = ("calibrate", "plan", "evaluate", "tasks", "generate")
PAGES_WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood_and_of_one_model(page):
    assert len(PAGES_WITH_COMMANDS) > 5
    found = [(argv[0], understood(argv)) for argv in commands(page)]
    assert len({values.model for name, values in found if name in OF_A_MODEL}) <= 1


@pytest.mark.parametrize(
    "line", ["memory --contxt=1", "plan --out=x --budget=3bp", "evaluate --out=x --batch=0"]
)
def test_a_page_with_a_slip_is_noticed(line):
    with pytest.raises((cli.UsageError, turboq.TurboqError)):
        understood(line.split())


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
