"""Model folders: what is written is what loads, nothing foreign is run, and none is written over something else."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from model_folders import FAMILIES, model_of, same_weights, shared
from safetensors import safe_open

import nvae
from nvae.checkpoints.loading import load_checkpoint
from nvae.checkpoints.model_folder import CONFIG, DESCRIPTION, FILES, WEIGHTS, new_model_folder, write
from nvae.core.config import yaml_of
from nvae.core.errors import UserError
from nvae.models.base import Family


@pytest.fixture
def model() -> Family[Any]:
    return model_of(FAMILIES["nvae"])


def complaint(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        nvae.load_model(folder, **options)
    return str(error.value)


def rewritten(folder: Path, change: Any = None, **said: object) -> Path:
    """The folder with changed weights, or another description of them."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()[DESCRIPTION])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change is not None:
        change(weights)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, {DESCRIPTION: json.dumps(description | said)}))
    return folder


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("section", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_loads_as_it_was_to_the_last_bit(section: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(section)
    loaded = nvae.load_model(shared(tmp_path / "model", model))
    assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("held", ["ema", "raw", "published"])
def test_the_one_set_of_weights_is_taken_and_called_what_it_is(
    model: Family[Any], tmp_path: Path, held: Any, weights: Any
) -> None:
    loaded = load_checkpoint(shared(tmp_path / "model", model, held), weights=weights)
    assert (loaded.weights, loaded.updates, loaded.config) == (held, 7, None)


def test_the_weights_file_stands_for_its_folder(model: Family[Any], tmp_path: Path) -> None:
    assert same_weights(nvae.load_model(shared(tmp_path / "model", model) / WEIGHTS), model)


@pytest.mark.parametrize("place", [0, 4, 20, -1])
def test_a_flipped_bit_is_noticed(model: Family[Any], tmp_path: Path, place: int) -> None:
    file = shared(tmp_path / "model", model) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert "damaged" in complaint(tmp_path / "model")


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_truncated_file_is_noticed(model: Family[Any], tmp_path: Path, size: int) -> None:
    file = shared(tmp_path / "model", model) / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    assert complaint(tmp_path / "model") == f"{file}: damaged or truncated, or not a safetensors file"


def test_nothing_is_unpickled(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    torch.save(model.state_dict(), folder / WEIGHTS)
    assert "not a safetensors file" in complaint(folder)


def test_weights_of_another_tool_are_refused(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    safetensors.torch.save_file(dict(model.state_dict()), folder / WEIGHTS)
    assert complaint(folder) == f"{folder / WEIGHTS}: not the weights of a model folder of this package"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"version": 2}, "a model folder of format 2, this version of nvae reads format 1"),
        ({"weights": "best"}, "damaged, its description is none of this package"),
        ({"updates": -3}, "damaged, its description is none of this package"),
    ],
)
def test_another_description_is_refused(
    model: Family[Any], tmp_path: Path, said: dict[str, Any], sentence: str
) -> None:
    assert sentence in complaint(rewritten(shared(tmp_path / "model", model), **said))


def test_changed_weights_are_noticed(model: Family[Any], tmp_path: Path) -> None:
    folder = rewritten(shared(tmp_path / "model", model), lambda weights: weights["head.bias"].add_(1))
    assert complaint(folder) == f"{folder / WEIGHTS}: damaged, the weights are not as they were written"


def test_weights_that_are_not_finite_are_refused(model: Family[Any], tmp_path: Path) -> None:
    model.get_parameter("head.bias").data[0] = torch.nan
    folder = shared(tmp_path / "model", model)
    assert complaint(folder) == f"{folder}: the weights are not finite, first at 'head.bias'"


def test_a_config_of_another_model_is_refused_by_a_tensor(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    (folder / CONFIG).write_text(yaml_of({"model": {**FAMILIES["nvae"], "latent_channels": 3}}))
    assert "the weights are of another model than the config describes: '" in complaint(folder)


def test_a_config_with_an_unknown_field_is_refused(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    (folder / CONFIG).write_text(yaml_of({"model": {**FAMILIES["nvae"], "group": 3}}))
    assert "group: unknown field; did you mean 'groups'?" in complaint(folder)


def test_a_folder_without_its_config_says_so(model: Family[Any], tmp_path: Path) -> None:
    (shared(tmp_path / "model", model) / CONFIG).unlink()
    assert complaint(tmp_path / "model").startswith(f"{tmp_path / 'model' / CONFIG}: cannot be read")


# ------------------------------------------------------------------------------------------------------ foreign code


FOREIGN = """
from typing import Literal
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE

class ForeignConfig(NVAEConfig):
    family: Literal["foreign_family:Foreign"] = "foreign_family:Foreign"

class Foreign(NVAE):
    config_type = ForeignConfig
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose config names a family of a module that Python would find."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_family.py").write_text(FOREIGN)
    monkeypatch.delitem(sys.modules, "foreign_family", raising=False)
    folder = shared(tmp_path / "model", model_of(FAMILIES["nvae"]))
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("family: nvae", "family: foreign_family:Foreign"))
    return folder


def test_code_that_a_config_names_is_not_imported(foreign: Path) -> None:
    said = complaint(foreign)
    assert "model.family: 'foreign_family:Foreign' is code from elsewhere" in said and "trust_code=True" in said
    assert "foreign_family" not in sys.modules


def test_code_is_imported_where_it_is_trusted(foreign: Path) -> None:
    assert type(nvae.load_model(foreign, trust_code=True)).__name__ == "Foreign"
    assert type(nvae.from_pretrained(foreign, trust_code=True)).__name__ == "Foreign"


# ---------------------------------------------------------------------------------------------------------- writing


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_model_folder(tmp_path / "model") as staged:
        write(staged, CONFIG, b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(model: Family[Any], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert same_weights(nvae.load_model(shared(tmp_path / "model", model)), model)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has other things in it"), new_model_folder(tmp_path, overwrite=overwrite):
        raise AssertionError
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_weights_of_another_tool_are_something_else(model: Family[Any], tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text("")
    with pytest.raises(UserError, match="has other things in it"), new_model_folder(tmp_path, overwrite=True):
        raise AssertionError


def test_a_model_folder_is_replaced_only_when_told(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    with pytest.raises(UserError, match="is an exported model already"):
        shared(folder, model)


def test_what_is_replaced_keeps_files_of_others_and_no_earlier_program(model: Family[Any], tmp_path: Path) -> None:
    folder = shared(tmp_path / "model", model)
    for name in ("notes.txt", "sampler.pt2"):
        (folder / name).write_text("earlier")
    with new_model_folder(folder, overwrite=True) as staged:
        for name in (WEIGHTS, CONFIG):
            write(staged, name, b"later")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "notes.txt": "earlier", WEIGHTS: "later", CONFIG: "later",
    }  # fmt: skip


def test_weights_take_their_place_last() -> None:
    assert FILES[-1] == WEIGHTS
