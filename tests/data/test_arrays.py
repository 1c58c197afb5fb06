"""Arrays as sets: layouts that are read, and those that are refused by name, shape and type."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import noise

from nvae.core.errors import UserError
from nvae.data.arrays import ArrayFile, ArraySource, Joined, array_names


def saved(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (noise(5, 4, 4), noise(5, 4, 4)),
        (noise(5, 4, 4, 1), noise(5, 4, 4, 1)[..., 0]),
        (noise(5, 4, 6, 3), noise(5, 4, 6, 3)),
        (noise(5, 3, 4, 6), noise(5, 3, 4, 6).transpose(0, 2, 3, 1)),
        (noise(5, 1, 4, 6), noise(5, 1, 4, 6)[:, 0]),
    ],
    ids=["grey", "one channel last", "RGB last", "RGB second", "one channel second"],
)
def test_every_usual_layout_is_read(tmp_path: Path, array: Any, expected: Any) -> None:
    source = ArrayFile(saved(tmp_path / "x.npy", array))
    assert np.array_equal(source.stacked(), expected)
    assert np.array_equal(np.stack([np.asarray(source.load(i)) for i in range(5)]), expected)


def test_planar_rows_are_red_then_green_then_blue(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=noise(2, 3 * 16))
    source = ArrayFile(tmp_path / "x.npz", "data", planar=True)
    assert np.array_equal(source.stacked(), noise(2, 48).reshape(2, 3, 4, 4).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((5, 4, 4), dtype=np.float32), r"x\.npy holds float32; an array of images is uint8"),
        (np.array([{}, {}]), "holds object"),
        (noise(5, 4), r"x\.npy has shape \(5, 4\)"),
        (noise(5, 4, 4, 4), r"has shape \(5, 4, 4, 4\)"),
        (noise(0, 4, 4, 3), r"has shape \(0, 4, 4, 3\)"),
    ],
    ids=["floats", "objects", "flat", "RGBA", "empty"],
)
def test_an_array_that_holds_no_images_is_refused(tmp_path: Path, array: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ArrayFile(saved(tmp_path / "x.npy", array))


def test_a_truncated_array_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.npy", noise(5, 4, 4))
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=r"x\.npy is damaged, or not an array file"):
        ArrayFile(path).stacked()


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_text_is_no_array(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match="is damaged, or not an array file"):
        ArrayFile(tmp_path / name, None if name == "x.npy" else "data")


def test_the_arrays_of_an_npz_are_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(1, 2, 2), labels=np.zeros(1))
    assert array_names(tmp_path / "x.npz") == ["train", "labels"]


def test_taken_images_keep_their_names(tmp_path: Path) -> None:
    whole = ArrayFile(saved(tmp_path / "x.npy", noise(5, 4, 4)))
    part = whole.take([1, 4]).take([1])
    assert (part.name(0), part.load(0).tobytes()) == ("x.npy[4]", whole.load(4).tobytes())


def test_an_array_in_a_file_travels_as_its_path(tmp_path: Path) -> None:
    source = ArrayFile(saved(tmp_path / "x.npy", noise(50, 32, 32, 3)))
    source.load(0)
    assert len(pickle.dumps(source)) < 5_000


def parts() -> list[ArraySource]:
    return [ArraySource(noise(count, 4, 4, seed=count), f"part {count}") for count in (2, 3, 1)]


def test_joined_sources_follow_one_another() -> None:
    joined = Joined(parts())
    assert [joined.name(i) for i in (0, 2, 5)] == ["part 2[0]", "part 3[0]", "part 1[0]"]
    assert joined.load(4).tobytes() == parts()[1].load(2).tobytes()
    stacked = joined.stacked()
    assert stacked is not None
    assert np.array_equal(stacked, np.concatenate([part.array for part in parts()]))


def test_part_of_joined_sources_is_taken_from_each() -> None:
    taken = Joined(parts()).take([1, 3, 5])
    assert [taken.name(i) for i in range(3)] == ["part 2[1]", "part 3[1]", "part 1[0]"]
