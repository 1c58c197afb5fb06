"""A prepared store tells what is not as it was written, whatever part of it that is."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stand_ins import image_folder

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.preparation import prepare
from nvae.data.sets import open_images

CONFIG = DataConfig(size=8, holdout=0.3, workers=0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Images of two classes."""
    image_folder(tmp_path / "source", [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(8)])
    prepare(CONFIG.model_copy(update={"path": tmp_path / "source"}), tmp_path / "store", processes=1, progress=False)
    return tmp_path / "store"


def read(store: Path) -> None:
    images = open_images(DataConfig(path=store, size=8), "train")
    images.read(range(len(images)))
    assert len(images.labels) == len(images)


def test_a_store_as_it_was_written_is_read(store: Path) -> None:
    read(store)


@pytest.mark.parametrize("name", ["ends", "sizes", "labels", "crc", "seal"])
def test_a_table_that_was_changed_is_refused(store: Path, name: str) -> None:
    path = store / "train-00000.safetensors"
    tables = load_file(path)
    tables[name] = np.ascontiguousarray(tables[name])
    tables[name].reshape(-1)[0] ^= 1
    save_file(tables, path)
    with pytest.raises(
        UserError, match=r"train-00000\.safetensors: missing, damaged or truncated.*not as it was written"
    ):
        read(store)


@pytest.mark.parametrize(("field", "value"), [("levels", 254), ("unread", "nothing"), ("of a later version", 3)])
def test_an_index_that_was_changed_is_refused(store: Path, field: str, value: object) -> None:
    index = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**index, field: value}))
    with pytest.raises(UserError, match=r"store\.json: damaged"):
        read(store)


def test_a_store_of_an_earlier_version_has_no_seal_and_is_read(store: Path) -> None:
    index = json.loads((store / "store.json").read_text())
    del index["seal"]
    (store / "store.json").write_text(json.dumps(index))
    path = store / "train-00000.safetensors"
    tables = load_file(path)
    del tables["seal"]
    save_file(tables, path)
    read(store)


@pytest.mark.parametrize(
    "file", ["../train-00000.safetensors", "/train-00000.safetensors", "x/train-00000.safetensors"]
)
def test_a_shard_elsewhere_is_refused(store: Path, file: str) -> None:
    index = json.loads((store / "store.json").read_text())
    index["splits"]["train"]["shards"][0]["file"] = file
    del index["seal"]
    (store / "store.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"store\.json: damaged"):
        read(store)
