"""Downloads happen in folders that are the set's own, and leave nothing elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from filelock import FileLock
from stand_ins import image_folder

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.downloads import LOCK, from_torchvision, is_free
from nvae.data.named import find


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dataset: Any) -> None:
        (Path(dataset.root) / type(dataset).__name__ / "raw").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("no network")

    for name in ("MNIST", "CIFAR10", "CelebA"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download", fail)


@pytest.mark.parametrize("name", ["mnist", "stacked_mnist", "cifar10", "celeba_64", "omniglot", "imagenet_32"])
def test_nothing_is_made_in_a_folder_of_other_things(tmp_path: Path, name: Any) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"data\.path"):
        find(DataConfig(name=name, path=tmp_path)).of("train")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_layout_that_was_looked_for_is_said_and_where_it_is(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    with pytest.raises(UserError, match=rf"does not hold mnist: looked for MNIST/raw/.*; it is in {tmp_path}$"):
        find(DataConfig(name="mnist", path=tmp_path / "MNIST"))


def test_ones_own_images_under_a_sets_name_are_told_their_name(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png"])
    with pytest.raises(UserError, match=r"does not hold cifar10: .*images of your own are data\.name=images"):
        find(DataConfig(name="cifar10", path=tmp_path))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["empty", "missing"])
def test_a_download_that_fails_leaves_nothing_but_an_empty_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    with pytest.raises(UserError, match="downloading failed"):
        find(DataConfig(name="mnist", path=tmp_path / "set"))
    assert list((tmp_path / "set").iterdir()) == []


def test_a_folder_is_free_with_nothing_but_what_a_download_makes(tmp_path: Path) -> None:
    assert is_free(tmp_path / "x", ["MNIST"]) and is_free(tmp_path, ["MNIST"])
    (tmp_path / "MNIST").mkdir()
    (tmp_path / LOCK).touch()
    assert is_free(tmp_path, ["MNIST"])
    (tmp_path / "other").touch()
    assert not is_free(tmp_path, ["MNIST"])


def test_a_path_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("text")
    with pytest.raises(UserError, match=r"^data\.path: [^\n]*does not hold mnist[^\n]*$"):
        find(DataConfig(name="mnist", path=tmp_path / "x"))


@pytest.mark.parametrize(
    "refusal",
    [NotImplementedError("no flock"), OSError(37, "No locks available"), OSError(95, "Operation not supported")],
    ids=["unknown", "none left", "not supported"],
)
def test_a_file_system_without_locks_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refuse(_: object) -> None:
        raise refusal

    def dataset(path: Path, download: bool) -> str:
        if not download:
            raise RuntimeError("not found")
        return "the set"

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    assert from_torchvision(dataset, tmp_path) == "the set"
