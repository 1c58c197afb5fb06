"""load_model: one door for run folders, checkpoints of ours and published ones."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nvae
from nvae.checkpoints.format import save_checkpoint
from nvae.checkpoints.loading import model_config
from nvae.core.config import dump_yaml, read_yaml
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.published import to_published

Make = Callable[..., NVAEConfig]


def save(path: Path, model: NVAE, **more: Any) -> Path:
    config = {"model": model.config.model_dump(mode="json")}
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "ema": None, **more})
    return path


def complaint(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        nvae.load_model(*args, **kwargs)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- ours


def test_a_checkpoint_of_ours_gives_its_model_in_eval_mode(any_config: NVAEConfig, tmp_path: Path) -> None:
    model = NVAE(any_config)
    loaded = nvae.load_model(save(tmp_path / "a.pt", model))
    assert loaded.config == any_config
    assert not loaded.training
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_path_may_be_a_string(tiny_config: Make, tmp_path: Path) -> None:
    nvae.load_model(str(save(tmp_path / "a.pt", NVAE(tiny_config()))))


def test_a_run_folder_gives_its_newest_checkpoint(tiny_config: Make, tmp_path: Path) -> None:
    for step in (5, 20, 10):
        newest = NVAE(tiny_config())
        newest.head.bias.data.fill_(step)
        save(tmp_path / "checkpoints" / f"step-{step:09d}.pt", newest)
    loaded = nvae.load_model(tmp_path)
    assert isinstance(loaded, NVAE)
    assert loaded.head.bias is not None
    assert float(loaded.head.bias.detach().mean()) == 20


def test_averaged_weights_are_taken_where_there_are_any(tiny_config: Make, tmp_path: Path) -> None:
    raw, averaged = NVAE(tiny_config()), NVAE(tiny_config())
    path = save(tmp_path / "a.pt", raw, ema=averaged.state_dict())
    ema, plain = nvae.load_model(path), nvae.load_model(path, weights="raw")
    assert torch.equal(ema.state_dict()["head.weight"], averaged.head.weight)
    assert torch.equal(plain.state_dict()["head.weight"], raw.head.weight)


def test_without_an_average_the_weights_themselves_are_taken(tiny_config: Make, tmp_path: Path) -> None:
    model = NVAE(tiny_config())
    loaded = nvae.load_model(save(tmp_path / "a.pt", model), weights="ema")
    assert torch.equal(loaded.state_dict()["head.weight"], model.head.weight)


def test_the_edge_can_be_chosen(tiny_config: Make, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", NVAE(tiny_config()))
    assert nvae.load_model(path).config.likelihood.edge == "right"
    assert nvae.load_model(path, mixture_edge="published").config.likelihood.edge == "published"


# -------------------------------------------------------------------------------------------------------- published


def test_a_published_checkpoint_keeps_its_edge_and_says_so(tiny_config: Make, tmp_path: Path) -> None:
    model = NVAE(tiny_config(image_size=32))
    torch.save(to_published(model, "cifar10"), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="published mixture edge") as record:
        loaded = nvae.load_model(tmp_path / "a.pt")
    assert loaded.config.likelihood.edge == "published"
    assert record[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize("edge", ["right", "published"])
def test_a_chosen_edge_is_taken_without_a_word(tiny_config: Make, tmp_path: Path, edge: Any) -> None:
    torch.save(to_published(NVAE(tiny_config(image_size=32)), "cifar10"), tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvae.load_model(tmp_path / "a.pt", mixture_edge=edge).config.likelihood.edge == edge


@pytest.mark.filterwarnings("ignore:published checkpoint")
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_weights_saved_from_within_a_wrapper_are_understood(
    tiny_config: Make, tmp_path: Path, wrapper: str
) -> None:
    published = to_published(NVAE(tiny_config(image_size=32)), "cifar10")
    torch.save(published, tmp_path / "plain.pt")
    published["state_dict"] = {f"{wrapper}{name}": tensor for name, tensor in published["state_dict"].items()}
    torch.save(published, tmp_path / "wrapped.pt")
    plain, wrapped = (nvae.load_model(tmp_path / f"{name}.pt").state_dict() for name in ("plain", "wrapped"))
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_what_is_beside_the_weights_may_have_any_keys(tiny_config: Make, tmp_path: Path) -> None:
    published = to_published(NVAE(tiny_config(image_size=32)), "cifar10") | {"scores": {0: 1.5, 1: 2.5}}
    torch.save(published, tmp_path / "a.pt")
    nvae.load_model(tmp_path / "a.pt", mixture_edge="published")


def test_a_binary_published_checkpoint_has_no_edge_to_speak_of(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(image_size=32, image_channels=1, likelihood={"kind": "bernoulli", "border": 2})
    torch.save(to_published(NVAE(config), "mnist"), tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nvae.load_model(tmp_path / "a.pt")


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.pt") == f"{tmp_path / 'no.pt'}: no such checkpoint"


def test_a_folder_without_checkpoints_says_what_it_lacks(tmp_path: Path) -> None:
    assert "a folder without checkpoints/step-*.pt" in complaint(tmp_path)


def test_a_dict_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "a.pt")
    assert complaint(tmp_path / "a.pt").startswith(f"{tmp_path / 'a.pt'}: neither a checkpoint of this package nor")


def test_a_checkpoint_of_a_later_format_says_so(tmp_path: Path) -> None:
    torch.save({"format": "nvae-checkpoint", "version": 2}, tmp_path / "a.pt")
    assert "a checkpoint of format 2, this version of nvae reads format 1" in complaint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [{}, {"config": {"model": {}}}, {"config": 3, "model": {}}, {"config": {}, "model": 3}]
)
def test_a_checkpoint_without_its_parts_says_so(tmp_path: Path, content: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "a.pt", content)
    assert "without a config or without a model" in complaint(tmp_path / "a.pt")


def test_weights_of_another_model_are_refused(tiny_config: Make, tmp_path: Path) -> None:
    model, other = NVAE(tiny_config()), NVAE(tiny_config(latent_channels=5))
    path = save(tmp_path / "a.pt", model)
    save_checkpoint(path, {"config": {"model": other.config.model_dump(mode="json")}, "model": model.state_dict()})
    said = complaint(path)
    assert said.startswith(f"{path}: the weights are of another model than the config describes: '")
    assert said.endswith("'groups.0.posterior.weight' is (6, 8, 3, 3), not (10, 8, 3, 3)")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_config: Make, tmp_path: Path, number: float) -> None:
    model = NVAE(tiny_config())
    model.head.weight.data[0, 0, 0, 0] = number
    path = save(tmp_path / "a.pt", model)
    assert complaint(path) == f"{path}: the weights are not finite, first at 'head.weight'"
    model = NVAE(tiny_config(image_size=32))
    model.head.weight.data[0, 0, 0, 0] = number
    torch.save(to_published(model, "cifar10"), path)
    assert complaint(path) == f"{path}: the weights are not finite, first at 'head.weight'"


def test_a_config_with_an_unknown_field_names_file_and_field(tiny_config: Make, tmp_path: Path) -> None:
    config = {"model": tiny_config().model_dump(mode="json") | {"group": 3}}
    save_checkpoint(tmp_path / "a.pt", {"config": config, "model": {}})
    message = complaint(tmp_path / "a.pt")
    assert message.startswith(str(tmp_path / "a.pt"))
    assert "group: unknown field; did you mean 'groups'?" in message


def test_an_unknown_family_names_the_nearest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"config": {"model": {"family": "nvea"}}, "model": {}})
    assert "unknown family 'nvea'; did you mean 'nvae'?" in complaint(tmp_path / "a.pt")


def test_a_config_file_is_read_for_its_model(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(dump_yaml(tiny_config()))
    assert model_config({"model": read_yaml(tmp_path / "model.yaml")}, "x") == tiny_config()
