"""Recipes by name, from a checkout or an installed package."""

from pathlib import Path

import pytest
from places import ROOT

from nvae.commands import recipes
from nvae.commands.recipes import recipe
from nvae.core.errors import UserError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without configs/, which the command is called in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar10.yaml", "configs/cifar10.yaml"])
def test_a_recipe_is_found_by_its_name_from_anywhere(elsewhere: Path, name: str) -> None:
    assert recipe(name) == ROOT / "configs" / "cifar10.yaml"


@pytest.mark.parametrize("name", ["ablations/mnist_base", "configs/ablations/mnist_base.yaml"])
def test_an_ablation_is_found_by_its_folder_and_name(elsewhere: Path, name: str) -> None:
    assert recipe(name) == ROOT / "configs" / "ablations" / "mnist_base.yaml"


def test_a_file_that_is_there_comes_first(elsewhere: Path) -> None:
    (elsewhere / "cifar10.yaml").write_text("")
    assert recipe("cifar10.yaml") == Path("cifar10.yaml")


def test_a_path_elsewhere_is_never_taken_for_a_name(elsewhere: Path) -> None:
    assert recipe("mine/cifar10.yaml") == Path("mine/cifar10.yaml")


def test_an_installed_package_has_the_recipes_inside(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "nvae" / "configs").mkdir(parents=True)
    (elsewhere / "nvae" / "configs" / "digits.yaml").write_text("")
    monkeypatch.setattr(recipes, "FOLDERS", (elsewhere / "nvae" / "configs", elsewhere / "nowhere"))
    assert recipe("digits") == elsewhere / "nvae" / "configs" / "digits.yaml"


def test_a_name_of_nothing_is_told_the_nearest(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^configs/cifr10\.yaml: no such file, nor a recipe; did you mean 'cifar10'\?"):
        recipe("configs/cifr10.yaml")
    monkeypatch.setattr(recipes, "FOLDERS", (elsewhere,))
    with pytest.raises(UserError, match=r"^digits: no such file, nor a recipe; there are none here"):
        recipe("digits")
