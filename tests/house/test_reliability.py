"""docs/reliability.md names tests that exist, and figures that were counted."""

import ast
import re

import pytest
from places import ROOT

from tests.gauntlet import reporting
from tests.gauntlet.groups import GROUPS

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
NAMED_GROUPS = sorted(set(re.findall(r"`gauntlet::([\w-]+)`", PAGE)))


def test_the_page_names_tests() -> None:
    assert len(TESTS) > 15


@pytest.mark.parametrize(("file", "name"), TESTS, ids=[f"{file}::{name}" for file, name in TESTS])
def test_a_test_that_keeps_a_promise_exists(file: str, name: str) -> None:
    body = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMED_GROUPS)
def test_a_group_that_keeps_a_promise_exists(name: str) -> None:
    assert GROUPS[name].full > 0


def test_the_table_is_what_the_last_full_run_counted() -> None:
    assert reporting.table(reporting.read(reporting.LAST_FULL_RUN)) in PAGE


def test_nothing_was_lost_or_let_in_or_broke_in_the_last_full_run() -> None:
    entries = reporting.read(reporting.LAST_FULL_RUN)
    left_out = {name for name, group in GROUPS.items() if group.full} - entries.keys()
    assert all(f"`{name}`" in PAGE.partition("Not in the table:")[2] for name in left_out)
    assert {name: reporting.failed(entry) for name, entry in entries.items()} == dict.fromkeys(entries, 0)
