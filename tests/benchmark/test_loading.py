"""The loading benchmarks run; what they measure is for a quiet machine."""

from pathlib import Path

import pytest
import torch
from stand_ins import image_folder

from nvae.benchmark.loading import decoder_rate, loader_rate, resident_milliseconds
from nvae.data.config import DataConfig
from nvae.data.loading import TrainingStream
from nvae.data.preparation import prepare
from nvae.data.sets import open_images

CPU = torch.device("cpu")


def test_resident_images_are_timed() -> None:
    assert 0 < resident_milliseconds(CPU, repeats=20) < 50


@pytest.mark.parametrize("size", [64, 72], ids=["raw", "webp"])
def test_a_store_is_timed_against_its_decoder(tmp_path: Path, size: int) -> None:
    image_folder(tmp_path / "images", [f"{i}.png" for i in range(8)], size=80)
    prepare(DataConfig(path=tmp_path / "images", size=size), tmp_path / "store", processes=1, progress=False)
    config = DataConfig(path=tmp_path / "store", size=size, memory=0, workers=0, batch=4)
    stream = TrainingStream(open_images(config, "train"), config, seed=0, device=CPU)
    assert loader_rate(stream, seconds=0.1) > 0
    assert decoder_rate(tmp_path / "store", seconds=0.1) > 0
