"""The law of docs/architecture.md, held against the imports of nvae/."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "nvae"
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## The law"
FAMILIES = ("nvae", "vdvae", "vqvae")
BEHIND_THE_CONTRACT = ("sampling", "evaluation", "training", "commands")
"""Rooms that know a family by its contract only."""


def law() -> dict[str, set[str]]:
    """Room -> the rooms it may import."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    fenced = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert fenced, f"{PAGE.name} has no fenced list under '{HEADING}'"
    rooms = {line.split()[0]: set(line.split()[1:]) for line in fenced[1].splitlines()}
    return {"core": set(), **rooms}


def files() -> list[str]:
    """Every file of the package, relative to nvae/; that of the package itself only hands names on."""
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return sorted(path.relative_to(PACKAGE).as_posix() for path in paths)


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
                yield candidate.as_posix()
                return
    raise AssertionError(f"{'.'.join(name)} is no file of the package")


def room_of(file: str) -> str:
    return file.split("/")[0]


def test_every_file_is_in_a_room_of_the_law() -> None:
    assert {room_of(file) for file in files()} == set(law())


def test_the_law_has_no_circle() -> None:
    list(TopologicalSorter(law()).static_order())


@pytest.mark.parametrize("file", files())
def test_a_file_imports_only_from_rooms_it_may(file: str) -> None:
    allowed = law()[room_of(file)] | {room_of(file)}
    others = sorted(other for other in set(imported(file)) if room_of(other) not in allowed)
    assert not others, f"nvae/{file} imports {others}"


def test_imports_make_no_circle() -> None:
    list(TopologicalSorter({file: set(imported(file)) for file in files()}).static_order())


def test_families_never_see_each_other() -> None:
    for file in files():
        for family in FAMILIES:
            if file.startswith(f"models/{family}/"):
                seen = [other for other in imported(file) if other.startswith("models/") and other.count("/") == 2]
                assert all(other.startswith(f"models/{family}/") for other in seen), f"nvae/{file} imports {seen}"


@pytest.mark.parametrize("room", BEHIND_THE_CONTRACT)
def test_a_family_is_known_by_its_contract_only(room: str) -> None:
    for file in files():
        if room_of(file) == room:
            seen = [other for other in imported(file) if re.match(r"models/\w+/", other)]
            assert not seen, f"nvae/{file} imports {seen}"


def test_nobody_above_bricks_sees_what_is_made_for_one_device() -> None:
    for file in files():
        if room_of(file) not in ("kernels", "bricks"):
            seen = [other for other in imported(file) if other.startswith(("kernels/cpu/", "kernels/triton/"))]
            assert not seen, f"nvae/{file} imports {seen}"


def test_every_room_says_what_belongs_in_it() -> None:
    for room in law():
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))), room


def test_the_package_hands_names_on_and_does_nothing_else() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    assert {type(node) for node in body} <= {ast.Expr, ast.ImportFrom, ast.Assign}


def test_imports_are_found_wherever_they_stand() -> None:
    assert {"core/config.py", "models/base.py"} <= set(imported("checkpoints/loading.py"))
    assert "models/nvae/published.py" in set(imported("checkpoints/loading.py")), "from … import published"
    assert list(resolved(("nvae", "models", "nvae", "model", "NVAE"))) == ["models/nvae/model.py"]
    assert list(resolved(("torch", "nn"))) == []


def test_no_code_chooses_a_device_by_itself() -> None:
    """Devices come from the inputs."""
    for file in files():
        assert ".cuda()" not in (PACKAGE / file).read_text(encoding="utf-8"), file
