"""Models by their names: those that ship with the package, wherever a run is taken."""

from pathlib import Path
from typing import Any

import pytest
from model_folders import FAMILIES, model_of, same_weights, shared

import nvae
from nvae.checkpoints import pretrained
from nvae.checkpoints.loading import load_checkpoint
from nvae.commands.subject import beside
from nvae.core.errors import UserError
from nvae.models.base import Family


@pytest.fixture
def model() -> Family[Any]:
    return model_of(FAMILIES["very deep"])


@pytest.fixture
def shipped(model: Family[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `tiny-digits`, which ships; the working folder is empty."""
    folder = shared(tmp_path / "pretrained" / "tiny-digits", model)
    (tmp_path / "pretrained" / "README.md").write_text("no model")
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "nowhere", tmp_path / "pretrained"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def complaint(name: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        nvae.from_pretrained(name, **options)
    return str(error.value)


def test_those_that_ship_are_listed(shipped: Path) -> None:
    assert pretrained.pretrained_models() == {"tiny-digits": shipped}


def test_one_that_ships_is_loaded_by_its_name(shipped: Path, model: Family[Any]) -> None:
    assert same_weights(nvae.from_pretrained("tiny-digits"), model)
    assert same_weights(nvae.load_model("tiny-digits"), model)


def test_what_lies_here_under_that_name_comes_first(shipped: Path, model: Family[Any]) -> None:
    other = model_of(FAMILIES["nvae"])
    shared(Path("tiny-digits"), other)
    assert same_weights(nvae.from_pretrained("tiny-digits"), other)


def test_a_folder_is_loaded_by_its_path(model: Family[Any], tmp_path: Path) -> None:
    assert same_weights(nvae.from_pretrained(shared(tmp_path / "model", model)), model)


def test_an_unknown_name_is_answered_with_those_that_ship(shipped: Path) -> None:
    assert complaint("mnist") == (
        "mnist: no such folder, nor user/name of the hub, nor a model that ships; allowed: tiny-digits"
    )
    assert complaint("tiny-digit").endswith("; did you mean 'tiny-digits'?")
    with pytest.raises(UserError, match=r"^mnist: no such checkpoint, nor a model that ships .*: tiny-digits$"):
        load_checkpoint("mnist")


def test_a_revision_is_for_the_hub(shipped: Path) -> None:
    assert complaint("tiny-digits", revision="v1").startswith("revision: has no effect")


@pytest.mark.parametrize(
    ("weights", "results"),
    [
        ("a/x.pt", "a/x"),
        ("a/x/model.safetensors", "a/x-results"),
        ("x/model.safetensors", "x-results"),
    ],
)
def test_results_go_beside_what_was_given(weights: str, results: str) -> None:
    assert beside(Path(weights)) == Path(results)


def test_results_of_the_working_folder_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert beside(Path("model.safetensors")) == tmp_path / "model-results"


def test_results_of_one_that_ships_go_to_the_working_folder(shipped: Path) -> None:
    assert beside(shipped / "model.safetensors") == Path("tiny-digits-results")
