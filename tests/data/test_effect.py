"""Every field that is given is used or refused, in reading, preparing and reading what was prepared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
from stand_ins import image_folder, noise, published_lmdb

from nvae.core.errors import UserError
from nvae.data.config import LOADING, DataConfig
from nvae.data.found import SHAPED
from nvae.data.named import SETS
from nvae.data.preparation import prepare, read_config, require_words_used
from nvae.data.sets import in_effect, open_images


def folder(path: Path) -> Path:
    return image_folder(path / "images", [f"{i}.png" for i in range(10)])


def with_splits(path: Path) -> Path:
    return image_folder(path / "splits", ["train/a.png", "test/b.png"])


def array(path: Path) -> Path:
    np.save(path / "x.npy", noise(10, 32, 32, 3))
    return path / "x.npy"


def raw_squares(path: Path) -> Path:
    return published_lmdb(path / "x.lmdb", [noise(32, 32, 3, seed=i).tobytes() for i in range(10)])


def mnist(path: Path) -> Path:
    return stand_ins.mnist(path)


def omniglot(path: Path) -> Path:
    return stand_ins.omniglot(path)


def celeba(path: Path) -> Path:
    return stand_ins.celeba(path)


@pytest.mark.parametrize(
    ("make", "name", "field", "value"),
    [
        (None, "digits", "path", "elsewhere"),
        (None, "digits", "holdout", 0.3),
        (None, "digits", "enlarge", True),
        (mnist, "mnist", "holdout", 0.3),
        (mnist, "mnist", "crop", "random"),
        (mnist, "mnist", "lists", "lists"),
        (mnist, "stacked_mnist", "enlarge", True),
        (omniglot, "omniglot", "lists", "lists"),
        (celeba, "celeba_64", "crop", "random"),
        (celeba, "celeba_64", "holdout", 0.3),
        (with_splits, "images", "holdout", 0.3),
        (array, "images", "crop", "random"),
        (raw_squares, "images", "crop", "random"),
    ],
)
def test_a_field_without_effect_is_refused_by_name(
    tmp_path: Path, make: Any, name: Any, field: str, value: Any
) -> None:
    fields = {"path": make(tmp_path)} if make else {}
    with pytest.raises(UserError, match=rf"data\.{field}: .*has no effect on"):
        open_images(DataConfig(name=name, **{**fields, field: value}), "train")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (folder, {"holdout": 0.3}),
        (folder, {"crop": "random"}),
        (folder, {"enlarge": True, "size": 64}),
        (array, {"holdout": 0.3}),
        (folder, {"flip": True, "padding": 2, "batch": 4, "workers": 1}),
    ],
)
def test_a_field_with_an_effect_is_taken(tmp_path: Path, make: Any, fields: dict[str, Any]) -> None:
    assert len(open_images(DataConfig(path=make(tmp_path), **fields), "train")) > 0


def test_every_field_is_for_loading_or_claimed_by_some_set() -> None:
    claimed = SHAPED.union({"lists", "holdout"}, *(named.uses for named in SETS.values() if named))
    assert LOADING | claimed == set(DataConfig.model_fields)
    assert not LOADING & claimed


def test_what_a_name_brings_was_not_given() -> None:
    assert DataConfig(name="lsun_tower").given() == []
    assert DataConfig(name="lsun_tower", crop="centre").given() == ["crop"]


def test_a_config_of_before_is_read_without_what_has_no_effect() -> None:
    config = in_effect(DataConfig(name="digits", path=Path("elsewhere"), holdout=0.3, batch=7))
    assert (config.path, config.holdout, config.batch) == (None, 0.1, 7)


# ---------------------------------------------------------------------------------------------------------- preparing


def prepared(tmp_path: Path, **fields: Any) -> Path:
    config = DataConfig(**{"size": 16, "path": folder(tmp_path), **fields})
    prepare(config, tmp_path / "store", processes=1, progress=False)
    return tmp_path / "store"


def test_a_field_without_effect_is_refused_in_preparing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.holdout: has no effect on images with splits of their own"):
        prepare(DataConfig(path=with_splits(tmp_path), holdout=0.3), tmp_path / "store", progress=False)


def test_fields_that_nothing_followed_from_are_not_recorded(tmp_path: Path) -> None:
    index = prepare(DataConfig(name="digits"), tmp_path / "store", processes=1, progress=False)
    assert (index.settings.holdout, index.settings.source, index.settings.is_named) == (None, None, True)


@pytest.mark.parametrize("fields", [{"holdout": 0.3}, {"enlarge": True}, {"lists": Path("lists")}])
def test_a_store_refuses_what_it_was_not_prepared_with(tmp_path: Path, fields: dict[str, Any]) -> None:
    (field,) = fields
    with pytest.raises(UserError, match=rf"data\.{field}: is .*, but the store .* was prepared with"):
        open_images(DataConfig(path=prepared(tmp_path), size=16, **fields), "train")


def test_a_store_takes_what_it_was_prepared_with(tmp_path: Path) -> None:
    store = prepared(tmp_path, holdout=0.3, enlarge=True)
    assert len(open_images(DataConfig(path=store, size=16, holdout=0.3, enlarge=True), "test")) == 3


@pytest.mark.parametrize(
    ("words", "prepares", "describes", "problem"),
    [
        (["flip=true"], True, False, "flip: has no effect on preparing"),
        (["batch=3"], False, True, "batch: has no effect on describing"),
        (["binarize=true"], True, False, "binarize: has no effect on preparing"),
        (["size=3"], False, False, "size: has no effect on verifying"),
    ],
)
def test_a_word_without_effect_is_refused(words: list[str], prepares: bool, describes: bool, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        require_words_used(words, prepares=prepares, describes=describes)


def test_words_with_an_effect_are_taken() -> None:
    require_words_used(["size=16", "crop=random", "binarize=true"], prepares=True, describes=True)


def test_the_source_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name: is digits already, the first word of the command"):
        read_config("digits", ["name=mnist"])
    with pytest.raises(UserError, match=r"path: is .* already"):
        read_config(str(tmp_path), ["path=elsewhere"])
