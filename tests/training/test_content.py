"""A run notices when its images are not those it was begun on."""

from pathlib import Path

import pytest
from stand_ins import image_folder
from tiny_run import tiny_run, train_in

from nvae.core.errors import UserError
from nvae.training.config import AnyRunConfig
from nvae.training.content import Content, changed_images, content_in, text_of, trained_content
from nvae.training.folder import inside

BEFORE = {"train": Content(images=3, fingerprint="a"), "validation": Content(images=1, fingerprint="b")}


def test_the_same_images_are_nothing_to_speak_of() -> None:
    assert changed_images(BEFORE, BEFORE, allowed=False) == []


def test_a_run_of_before_says_nothing_of_its_images() -> None:
    assert changed_images({}, BEFORE, allowed=False) == []


@pytest.mark.parametrize(
    ("now", "line"),
    [(Content(images=4, fingerprint="c"), "3 → 4"), (Content(images=3, fingerprint="c"), "others")],
    ids=["more", "others"],
)
def test_other_training_images_are_refused_unless_allowed(now: Content, line: str) -> None:
    with pytest.raises(UserError, match=rf"trained on other images \(train images: {line}\)"):
        changed_images(BEFORE, {**BEFORE, "train": now}, allowed=False)
    assert changed_images(BEFORE, {**BEFORE, "train": now}, allowed=True) == [f"train images: {line}"]


def test_other_validation_images_are_told() -> None:
    now = {**BEFORE, "validation": Content(images=2, fingerprint="c")}
    assert changed_images(BEFORE, now, allowed=False) == ["validation images: 1 → 2"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text(text_of(BEFORE))
    assert content_in(tmp_path) == BEFORE
    assert trained_content(tmp_path) == "a"


def test_a_folder_of_before_says_nothing(tmp_path: Path) -> None:
    assert (content_in(tmp_path), trained_content(tmp_path)) == ({}, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"train": 3}'])
def test_damage_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(UserError, match=r"images\.json: damaged [^\n]*$"):
        content_in(tmp_path)


def own(path: Path, *overrides: str) -> AnyRunConfig:
    data = ("data.name=images", "data.size=8", "data.channels=1", f"data.path={path}", "data.batch=4")
    return tiny_run(*data, "train.steps=2", "train.save_every=1", *overrides)


def test_images_added_to_a_folder_between_two_starts_are_noticed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", [f"{i}.png" for i in range(12)], size=8)
    train_in(tmp_path, own(folder))
    moved = folder.rename(tmp_path / "moved")
    train_in(tmp_path, own(moved, "train.steps=3", "allow_changes=true"))
    image_folder(moved, ["new.png"], size=8)
    with pytest.raises(UserError, match=r"trained on other images \(train images: 11 → 12\)"):
        train_in(tmp_path, own(moved, "train.steps=3"))
    train_in(tmp_path, own(moved, "train.steps=4", "allow_changes=true"))
    assert content_in(tmp_path / "tiny")["train"].images == 12


@pytest.mark.parametrize("name", [".", "..", "../out", "a/../../b", "/abs", "", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is no name of a folder inside runs/"):
        inside(Path("runs"), name)


def test_a_name_may_be_a_number_or_have_parts() -> None:
    assert inside(Path("runs"), "2024/a..b") == Path("runs/2024/a..b")
