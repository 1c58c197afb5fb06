"""convert_checkpoint: published → ours → published gives back every tensor."""

from pathlib import Path

import pytest
import torch
from places import PARITY
from toy_family import Toy, ToyConfig

import nvae
from nvae.checkpoints.conversion import convert
from nvae.checkpoints.format import read_safely, save_checkpoint
from nvae.core.errors import UserError
from nvae.models.nvae.published import SAFE_TYPES

CASES = ("cifar10_flow", "mnist_multiscale", "cifar10_normal_decoder")


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_gives_every_tensor_and_argument(case: str, tmp_path: Path) -> None:
    source = PARITY / case / "checkpoint.pt"
    convert(source, tmp_path / "ours.pt")
    convert(tmp_path / "ours.pt", tmp_path / "back.pt")
    before, after = read_safely(source, SAFE_TYPES), read_safely(tmp_path / "back.pt", SAFE_TYPES)
    assert {k: before[k] for k in before if k != "state_dict"} == {k: after[k] for k in after if k != "state_dict"}
    assert before["state_dict"].keys() == after["state_dict"].keys()
    for name, tensor in before["state_dict"].items():
        assert torch.equal(tensor, after["state_dict"][name]), name


def test_a_converted_checkpoint_loads_to_the_same_model_and_keeps_the_published_edge(tmp_path: Path) -> None:
    source = PARITY / "cifar10_flow" / "checkpoint.pt"
    convert(source, tmp_path / "ours.pt")
    converted = nvae.load_model(tmp_path / "ours.pt")
    with pytest.warns(UserWarning, match="published mixture edge"):
        direct = nvae.load_model(source)
    assert converted.config == direct.config
    assert converted.config.likelihood.edge == "published"
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, converted.state_dict()[name]), name


def test_a_conversion_never_writes_over_what_it_reads(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes((PARITY / "cifar10_flow" / "checkpoint.pt").read_bytes())
    (tmp_path / "link.pt").symlink_to(file)
    before = file.read_bytes()
    for target in (file, tmp_path / "link.pt"):
        with pytest.raises(UserError, match="is what is to be converted; name another file"):
            convert(file, target, overwrite=True)
    assert file.read_bytes() == before


def test_a_conversion_writes_over_another_file_only_if_told_to(tmp_path: Path) -> None:
    source, target = PARITY / "cifar10_flow" / "checkpoint.pt", tmp_path / "ours.pt"
    target.write_bytes(b"dear")
    with pytest.raises(UserError, match=r"ours\.pt: exists already; name another file, or --overwrite it"):
        convert(source, target)
    assert target.read_bytes() == b"dear"
    convert(source, target, overwrite=True)
    nvae.load_model(target)


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        convert(PARITY / "cifar10_flow" / "checkpoint.pt", tmp_path, overwrite=True)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="neither"):
        convert(tmp_path / "other.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_another_set_than_the_model_is_for_is_refused(tmp_path: Path) -> None:
    convert(PARITY / "cifar10_flow" / "checkpoint.pt", tmp_path / "ours.pt")
    with pytest.raises(UserError, match="mnist"):
        convert(tmp_path / "ours.pt", tmp_path / "back.pt", dataset="mnist")


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    config = {"model": {"family": "toy_family:Toy", "image_size": 8, "image_channels": 1}}
    model = Toy(ToyConfig(image_size=8, image_channels=1))
    save_checkpoint(tmp_path / "toy.pt", {"config": config, "model": model.state_dict(), "ema": None})
    with pytest.raises(UserError, match="Toy"):
        convert(tmp_path / "toy.pt", tmp_path / "out.pt")
