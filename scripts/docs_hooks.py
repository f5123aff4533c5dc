"""What mkdocs does not know of this repository: generated pages, and links out of docs/.

reference/PACKAGE.md is made of the package's public names; reference/command.md ends with all
flags. Files of the repository that a page links to become part of the site, so that it is whole by
itself; a link to a file that is not there ends the build.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"turboq": ".", "turboq_kernels": "kernels", "turboq_calibrate": "calibrate"}
LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]*)([^)\s]*\))")
COPIED = "repository"  # where files from outside docs/ lie in the site


class PowersArePowers(griffe.Extension):
    """Docstrings are read as Markdown, where 2**bits begins bold text: not outside code."""

    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(
                line if line.lstrip().startswith((">>>", "...")) or line[:4] == "    "
                else re.sub(r"(?<=[\w)])\*\*(?=[\w(])", r"\\*\\*", line)
                for line in lines
            )  # fmt: skip


def public(package: str) -> dict[str, str]:
    """Public name -> full name of what it is, from the package's own `__init__`."""
    found = importlib.import_module(package)
    places = getattr(found, "_NAMES", None)
    if places is not None:
        split = {name: place.partition(":") for name, place in places.items()}
        return {name: f"{module}.{other or name}" for name, (module, _, other) in split.items()}
    real = {name: getattr(found, name) for name in found.__all__}  # plain imports
    return {name: f"{x.__module__}.{x.__qualname__}" for name, x in real.items()}


def reference(package: str) -> str:
    """The page of one package: its docstring, then every public name."""
    lines = [f"# {package}", "", f"::: {package}", "    options:", "      members: false"]
    lines += ["      show_root_heading: false", ""]
    for _, place in sorted(public(package).items(), key=lambda item: item[0].lower()):
        lines += [f"::: {place}", ""]
    return "\n".join(lines)


def commands() -> str:
    """What `turboq COMMAND --help` prints, of every command."""
    from turboq_calibrate.cli import help as pages
    from turboq_calibrate.cli import main as cli

    lines = ["## Every flag", ""]
    for name in cli.COMMANDS:
        module = importlib.import_module(f"turboq_calibrate.cli.{name}")
        page = pages.command(name, module, cli._define(module))
        lines += [f"### turboq {name}", "", "```text", page, "```", ""]
    return "\n".join(lines)


def outside(source: str, text: str) -> Iterable[tuple[str, Path]]:
    """(link, file of the repository) of every link of a page that leaves docs/."""
    for _, link, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
        if not path.startswith("docs/"):
            yield link, ROOT / path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    for folder in reversed(PACKAGES.values()):
        sys.path.insert(0, str(ROOT / folder))
    made = {f"reference/{name}.md": reference(name) for name in PACKAGES}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for page in files.documentation_pages():
        for link, path in outside(page.src_uri, page.content_string):
            if not path.exists():
                raise PluginError(f"{page.src_uri}: no file {link} in the repository")
            target = f"{COPIED}/{path.relative_to(ROOT).as_posix()}"
            if path.is_file() and target not in files.src_uris:
                # As text: a .md of the repository is not a page of the site.
                name = target + ".txt" if path.suffix == ".md" or not path.suffix else target
                if name not in files.src_uris:
                    files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    up = "../" * page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        found = dict(outside(page.file.src_uri, match[0]))
        if not found:
            return match[0]
        path = found[match[2]]
        if not path.is_file():  # a folder: its name, there is nothing to open
            return match[0].replace(match[2], up + "reference/index.md")
        name = f"{COPIED}/{path.relative_to(ROOT).as_posix()}"
        name += ".txt" if path.suffix == ".md" or not path.suffix else ""
        return f"{match[1]}{up}{name})"

    if page.file.src_uri == "reference/command.md":
        markdown += "\n\n" + commands()
    return LINK.sub(inside, markdown)


def on_post_build(config: Mapping[str, Any]) -> None:
    """Fails the build if a page would fetch anything."""
    from mkdocs.exceptions import PluginError

    fetch = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?https?://""")
    site = Path(config["site_dir"])
    bad = [p for p in sorted(site.rglob("*.html")) if fetch.search(p.read_text())]
    bad += [p for p in sorted(site.rglob("*.css")) if re.search(r"url\(https?:", p.read_text())]
    if bad:
        raise PluginError(f"{bad[0].relative_to(site)} fetches something from a network")
