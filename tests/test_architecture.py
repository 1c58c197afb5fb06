"""The order of layers in docs/architecture.md, held against the imports of nvae/."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nvae"
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## The layers"


def layers() -> list[list[str]]:
    """The files of each line of the list under the heading, relative to nvae/."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    fenced = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert fenced, f"{PAGE.name} has no fenced list under '{HEADING}'"
    return [line.split() for line in fenced[1].splitlines()]


def files() -> list[str]:
    """Every file of the package that holds code, relative to nvae/; that of the package itself only hands names on."""
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and path.stat().st_size)
    return sorted(str(path.relative_to(PACKAGE)) for path in paths)


def imported(file: str) -> Iterator[str]:
    """The files of nvae/ that a file imports, wherever in it, relative to nvae/."""
    package = ("nvae", *Path(file).parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from resolved(tuple(alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield from resolved((*module, alias.name))


def resolved(name: tuple[str, ...]) -> Iterator[str]:
    """The file that a dotted name of nvae stands for: a module, or the one that holds the name."""
    if name[0] != "nvae":
        return
    for length in (len(name), len(name) - 1):
        inside = Path(*name[1:length])
        for candidate in (inside.with_suffix(".py") if inside.name else inside, inside / "__init__.py"):
            if (PACKAGE / candidate).is_file():
                yield str(candidate)
                return
    raise AssertionError(f"{'.'.join(name)} is no file of the package")


def test_every_file_has_its_place_in_the_order() -> None:
    placed = [file for layer in layers() for file in layer]
    assert len(placed) == len(set(placed)), "a file stands in two places"
    missing, gone = set(files()) - set(placed), set(placed) - set(files())
    assert not missing, f"give {sorted(missing)} a place in the list under '{HEADING}' of {PAGE.relative_to(ROOT)}"
    assert not gone, f"take {sorted(gone)} off the list under '{HEADING}' of {PAGE.relative_to(ROOT)}"


@pytest.mark.parametrize("file", files())
def test_a_file_imports_only_what_comes_before_it(file: str) -> None:
    order = [other for layer in layers() for other in layer]
    before = set(order[: order.index(file)]) if file in order else set(order)
    later = sorted(set(imported(file)) - before)
    assert not later, f"nvae/{file} imports {later}, which do not come before it"


def test_the_package_hands_names_on_and_does_nothing_else() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    assert {type(node) for node in body} <= {ast.Expr, ast.ImportFrom, ast.Assign}


def test_imports_are_found_wherever_they_stand() -> None:
    assert {"config.py", "models/base.py"} <= set(imported("loading.py"))
    assert "published.py" in set(imported("loading.py")), "from . import published"
    assert list(resolved(("nvae", "models", "nvae", "NVAE"))) == ["models/nvae.py"]
    assert list(resolved(("torch", "nn"))) == []


def test_no_code_chooses_a_device_by_itself() -> None:
    """Devices come from the inputs."""
    for file in files():
        assert ".cuda()" not in (PACKAGE / file).read_text(encoding="utf-8"), file
