"""Files of latents: written a part at a time, read by anyone's libraries, read again some images at a time."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

from nvae.core.errors import UserError
from nvae.sampling.latent_files import (
    ENDINGS,
    FORMAT,
    VERSION,
    Column,
    LatentFile,
    column,
    name_column,
    names_in,
    write_file,
)

ABOUT = {"format": FORMAT, "version": VERSION, "model": "0123"}
NAMES = ["a.png", "tür/b.png", "c", "d" * 40, "e"]


def arrays() -> dict[str, np.ndarray]:
    """Of five images, with types of every width."""
    random = np.random.default_rng(0)
    return {
        "z/00": random.standard_normal((5, 2, 1, 1)).astype(np.float16),
        "z/01": random.standard_normal((5, 3, 2, 2)).astype(np.float32),
        "z/02": random.integers(0, 9, (5, 1, 3, 3)).astype(np.uint8),
        "labels": np.arange(5) - 1,
    }


def in_parts(name: str, array: np.ndarray) -> Column:
    return Column(name, array.dtype, array.shape, lambda: [array[:2], array[2:3], array[3:]])


def written(path: Path) -> Path:
    columns = [*(in_parts(name, array) for name, array in arrays().items()), name_column(NAMES, path.suffix)]
    with path.open("wb") as file:
        write_file(file, path.suffix, ABOUT, columns)
    return path


def test_numpy_reads_an_npz(tmp_path: Path) -> None:
    with np.load(written(tmp_path / "a.npz")) as found:
        for name, array in arrays().items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        assert found["names"].tolist() == NAMES and json.loads(str(found["metadata"])) == ABOUT


def test_safetensors_reads_a_safetensors(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    found = safetensors.numpy.load_file(path)
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert names_in(found["names"]) == NAMES
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == ABOUT
        torch.testing.assert_close(file.get_tensor("z/01"), torch.from_numpy(arrays()["z/01"]), rtol=0, atol=0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_some_images_are_read_in_any_order(ending: str, tmp_path: Path) -> None:
    file = LatentFile(written(tmp_path / f"a{ending}"))
    assert file.names == NAMES and file.shapes == [(2, 1, 1), (3, 2, 2), (1, 3, 3)]
    assert file.labels is not None and file.labels.tolist() == [-1, 0, 1, 2, 3]
    for first, last in ((3, 5), (0, 1), (1, 4)):
        for found, array in zip(file.rows(first, last), arrays().values(), strict=False):
            np.testing.assert_array_equal(found, array[first:last])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_has_the_same_bytes_every_time(ending: str, tmp_path: Path) -> None:
    first, second = (written(tmp_path / f"{name}{ending}").read_bytes() for name in "ab")
    assert first == second


def test_an_npz_that_numpy_packed_is_read(tmp_path: Path) -> None:
    about = np.array(json.dumps(ABOUT))
    np.savez_compressed(tmp_path / "a.npz", **arrays(), names=np.array(NAMES), metadata=about)
    file = LatentFile(tmp_path / "a.npz")
    for first, last in ((2, 4), (0, 5)):
        np.testing.assert_array_equal(file.rows(first, last)[1], arrays()["z/01"][first:last])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("length", [0, 3, 40, 400, -40])
def test_a_truncated_file_is_refused(ending: str, length: int, tmp_path: Path) -> None:
    path = written(tmp_path / f"a{ending}")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="damaged, or not a file of latents"):
        LatentFile(path)


def npz(**content: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{"names": np.array(NAMES), "metadata": np.array(json.dumps(ABOUT)), **content})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"nothing", "damaged, or not a file of latents"),
        (npz(metadata=np.array("{}")), "not of nvae-encode"),
        (npz(metadata=np.array("[1]")), "damaged, or not a file of latents"),
        (npz(metadata=np.zeros(3)), "damaged, or not a file of latents"),
        (npz(**{"z/01": np.zeros((5, 1, 1, 1))}), "groups are held from z/00 on without a gap"),
        (npz(**{"z/00": np.zeros((4, 1, 1, 1))}), r"z/00 is of shape \(4, 1, 1, 1\), names are 5"),
        (npz(**{"z/00": np.zeros(())}), r"z/00 is of shape \(\), names are 5"),
        (npz(**{"z/00": np.zeros((2, 5, 1, 1)).T}), "Fortran"),
        (npz(**{"z/00": np.array([None] * 5)}), "an array of objects"),
        (npz(names=np.zeros((5, 2))), r"names are text, or rows of uint8, found float64 of shape \(5, 2\)"),
        (npz(names=np.zeros((5, 0), "u1")), "damaged, or not a file of latents"),
        (npz(names=np.full((5, 2), 255, "u1")), "damaged, or not a file of latents"),
    ],
)
def test_what_is_no_file_of_latents_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        LatentFile(path)


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"z/00": np.zeros((2, 1, 1, 1), "f4")}, tmp_path / "a.safetensors", metadata=ABOUT)
    with pytest.raises(UserError, match="has no names"):
        LatentFile(tmp_path / "a.safetensors")


def test_columns_of_an_array_are_the_array() -> None:
    array = np.arange(6).reshape(3, 2)
    (part,) = column("x", array).parts()
    assert part is array
