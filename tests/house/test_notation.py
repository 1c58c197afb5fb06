"""docs/notation.md, docs/vdvae.md and docs/vqvae.md point at things that exist."""

import ast
import re

import pytest
from places import ROOT

PAGES = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("notation.md", "vdvae.md", "vqvae.md"))
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGES)))


def names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or a class defines, methods and fields included."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def test_the_page_has_references() -> None:
    assert len(REFERENCES) > 50


@pytest.mark.parametrize(("file", "name"), REFERENCES, ids=[f"{file}:{name}" for file, name in REFERENCES])
def test_a_reference_is_a_name_of_its_file(file: str, name: str) -> None:
    body = ast.parse((ROOT / "nvae" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        known = names(body)
        assert part in known, f"nvae/{file} has no {name}"
        node = known[part]
        body = node.body if isinstance(node, ast.ClassDef) else []
