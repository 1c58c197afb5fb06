"""Families by name: whose modules are imported, and what is no family."""

import sys

import pytest

from nvae.core.errors import UserError
from nvae.models.registry import family


@pytest.mark.parametrize("name", ["antigravity:fly", "this:s", "os:system", "os.path:join", "webbrowser:open"])
def test_no_module_of_python_is_imported_for_a_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some open a browser when they are."""
    for module in ("antigravity", "this"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=r"model\.family: .* is a part of Python"):
        family(name)
    assert not {"antigravity", "this"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["torch.nn:Module", "torch:load", "nvae.models.base:Family", "toy_family:torch"])
def test_what_is_no_family_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.family: .* is not a Family"):
        family(name)


@pytest.mark.parametrize("name", ["x:y", "a b:c", "toy_family:Nothing", ".x:y", ":x"])
def test_what_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.family: .* cannot be imported"):
        family(name)
