"""Trivial models have bits/dim that can be worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import noise

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.description import describe, histogram, histogram_bits, png_bits, write_sheet
from nvae.data.images import InMemory


def test_a_histogram_counts_every_value_at_every_pixel() -> None:
    batches = [torch.tensor([[[[0, 2]]], [[[1, 2]]]]), torch.tensor([[[[0, 0]]]])]
    assert histogram(iter(batches), 2).tolist() == [[2, 1], [1, 0], [0, 2]]


def test_a_histogram_of_nothing_is_uniform() -> None:
    images = torch.randint(0, 256, (3, 1, 4, 4))
    assert histogram_bits(torch.zeros(256, 16, dtype=torch.int64), images) == pytest.approx(8)


def test_histogram_bits_are_of_smoothed_frequencies() -> None:
    """Seen 3 times 0 and once 1 of two values: (3+1)/(4+2) and (1+1)/(4+2)."""
    counts = torch.tensor([[3], [1]])
    images = torch.tensor([0, 0, 1]).reshape(3, 1, 1, 1)
    assert histogram_bits(counts, images) == pytest.approx(-(2 * math.log2(4 / 6) + math.log2(2 / 6)) / 3)


def test_pixels_that_never_vary_cost_next_to_nothing() -> None:
    images = torch.full((1000, 1, 4, 4), 7)
    assert histogram_bits(histogram(iter([images]), 255), images) == pytest.approx(math.log2((1000 + 256) / 1001))


def test_noise_is_not_compressed_and_flat_images_are() -> None:
    noisy, flat = torch.from_numpy(noise(2, 3, 64, 64)), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert png_bits(noisy) > 8
    assert png_bits(flat) < 0.2


def test_binary_images_are_compressed_with_one_bit_a_pixel() -> None:
    images = torch.from_numpy(noise(2, 1, 64, 64) % 2)
    assert 1 < png_bits(images, binary=True) < 1.3


@pytest.mark.parametrize(("count", "side"), [(100, 8 * 66 + 2), (3, 66 + 2)])
def test_a_contact_sheet_is_eight_images_wide(tmp_path: Path, count: int, side: int) -> None:
    write_sheet(InMemory(torch.from_numpy(noise(count, 3, 64, 64))), tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height == side


def test_small_images_are_shown_large(tmp_path: Path) -> None:
    write_sheet(InMemory(torch.full((2, 1, 8, 8), 16, dtype=torch.uint8), levels=16), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (68, 134, 3)
    assert sheet.min() == 255  # white images on white


def test_a_set_is_described(tmp_path: Path) -> None:
    found = describe(DataConfig(name="digits"), tmp_path / "sheet.png")
    assert (found.counts, found.shape, found.measured) == ({"train": 1500, "test": 297}, (1, 8, 8), 297)
    assert found.uniform == pytest.approx(math.log2(17))
    assert found.histogram < found.uniform
    assert (tmp_path / "sheet.png").exists()


def test_a_binarised_set_is_described_in_bits_of_black_and_white(tmp_path: Path) -> None:
    found = describe(DataConfig(name="digits", binarize=True), tmp_path / "sheet.png")
    assert found.uniform == 1
    assert found.histogram < 1


def test_nats_are_of_a_whole_image(tmp_path: Path) -> None:
    lines = describe(DataConfig(name="digits", binarize=True), tmp_path / "sheet.png").lines()
    (uniform,) = (line for line in lines if "uniform" in line)
    assert f"{64 * math.log(2):.1f} nats" in uniform


def test_a_set_whose_other_split_is_validation_is_described(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(9, 8, 8), val=noise(5, 8, 8))
    found = describe(DataConfig(path=tmp_path / "x.npz", size=8, channels=1), tmp_path / "sheet.png")
    assert (found.counts, found.measured) == ({"train": 9, "validation": 5}, 5)


def test_classes_are_counted(tmp_path: Path) -> None:
    found = describe(DataConfig(name="digits"), tmp_path / "sheet.png")
    assert sum(found.classes["test"].values()) == 297 and set(found.classes["train"]) == set(range(10))
    assert any(line.startswith("classes   train 0: ") for line in found.lines())


def test_of_unknown_classes_nothing_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(9, 8, 8), test=noise(5, 8, 8))
    lines = describe(DataConfig(path=tmp_path / "x.npz", size=8, channels=1), tmp_path / "sheet.png").lines()
    assert not any(line.startswith("classes") for line in lines)


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--describe: .*sheet\.png cannot be written: [^\n]*$"):
        describe(DataConfig(name="digits"), tmp_path / "file" / "sheet.png")
