"""The documentation is a site: it builds without a warning, and leads to every document."""

import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def navigated(entry: object) -> list[str]:
    """The documents of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    assert isinstance(entry, list | dict)
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in navigated(part)]


def prose(page: Path) -> list[str]:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()


def test_every_document_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    documents = [path.name for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")]
    assert sorted(navigated(nav)) == sorted(documents)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_lists_and_tables_stand_apart(page: Path) -> None:
    """GitHub takes them directly below a line of text, Python's Markdown does not."""
    lines = prose(page)
    for before, line in pairwise(lines):
        begins = re.match(r"(- |\d+\. |\|)", line) and not re.match(r"(- |\d+\. |\||  )", before)
        assert not (begins and before.strip()), line
        assert not re.match(r" {1,3}(- |\d+\. |\||```)", line), f"four spaces, or none: {line}"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None, reason="the extra docs is not installed")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")}
    assert {"index.html", "training/index.html", "tutorial/index.html"} <= pages
