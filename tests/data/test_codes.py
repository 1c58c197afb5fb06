"""Codes kept beside the images of a store: made once, whole or not at all, and named by what made them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import image_folder
from torch import Tensor

from nvae.core.errors import UserError
from nvae.data import coding as making
from nvae.data import preparation
from nvae.data.codes import CODES, CodeIndex, Coding, StoredCodes, code_file, code_lines, damaged_codes
from nvae.data.coding import Coder, make_codes
from nvae.data.config import DataConfig
from nvae.data.preparation import prepare
from nvae.data.sets import open_images

NAMES = [f"{i:02d}.png" for i in range(20)]
SIZE, K = 8, 5
CODING = Coding(made_by="runs/a", first_stage="aa", codes=K, maps=((1, 1), (2, 2)), padding=0, mirrored=True)


def codes_of(x: Tensor) -> list[Tensor]:
    """A code of the whole image, and one of each quarter: their left halves' brightness, in fifths."""
    left = x.mean(1)[:, :, : x.shape[3] // 2]
    top = left.mean((1, 2), keepdim=True)
    bottom = torch.nn.functional.adaptive_avg_pool2d(x, 2).mean(1)
    return [(K * grey).long().clamp(max=K - 1) for grey in (top, bottom)]


def coder(**changes: Any) -> Coder:
    return Coder(CODING.model_copy(update=changes), codes_of, torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A store of two images a file."""
    monkeypatch.setattr(preparation, "SHARD_BYTES", 2 * 3 * SIZE**2)
    image_folder(tmp_path / "images", NAMES, size=SIZE)
    prepare(DataConfig(path=tmp_path / "images", size=SIZE), tmp_path / "store", processes=1, progress=False)
    return DataConfig(path=tmp_path / "store", size=SIZE, batch=3, flip=True)


def made(config: DataConfig, **changes: Any) -> CodeIndex:
    return make_codes(config, coder(**changes), progress=False)


def test_codes_are_those_of_the_images_and_of_their_mirror_images(config: DataConfig) -> None:
    made(config)
    for split in ("train", "test"):
        images = open_images(config, split)  # type: ignore[arg-type]
        grey = images.read(range(len(images))).float() / 255
        found = StoredCodes(config, split)  # type: ignore[arg-type]
        for seen, mirrored in ((grey, []), (grey.flip(3), range(len(images)))):
            expected = torch.cat([map_.flatten(1) for map_ in codes_of(seen)], dim=1)
            assert torch.equal(found.read(range(len(images)), mirrored), expected)


def test_rows_are_read_in_any_order_and_mirrored_one_by_one(config: DataConfig) -> None:
    made(config)
    codes = StoredCodes(config, "train")
    plain, mirrored = codes.read([0, 1, 2]), codes.read([0, 1, 2], [0, 1, 2])
    assert torch.equal(codes.read([2, 0, 1], [1]), torch.stack([plain[2], mirrored[0], plain[1]]))


def test_labels_stay_with_the_images(tmp_path: Path) -> None:
    prepare(DataConfig(name="digits"), tmp_path / "store", processes=1, progress=False)
    config = DataConfig(name="digits", path=tmp_path / "store")
    made(config, mirrored=False)
    assert torch.equal(open_images(config, "train").labels, open_images(DataConfig(name="digits"), "train").labels)


def test_what_was_finished_is_left_and_what_was_not_is_made(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(config)
    store = config.source
    (store / CODES).unlink()
    shards = sorted(store.glob("train-*.codes.safetensors"))
    kept = {path: path.stat().st_mtime_ns for path in shards[:3]}
    for path in shards[3:]:
        path.unlink()
    with pytest.raises(UserError, match="keeps no codes"):
        StoredCodes(config, "train")
    seen: list[int] = []
    batches = making.evaluation_batches
    monkeypatch.setattr(
        making, "evaluation_batches", lambda *a, start, **k: seen.append(start) or batches(*a, start=start, **k)
    )
    assert made(config) == whole
    assert seen == [6]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert made(config) == whole and len(seen) == 1


def test_files_of_another_first_stage_are_not_gone_on_from(config: DataConfig) -> None:
    made(config)
    (config.source / CODES).unlink()
    other = make_codes(
        config,
        Coder(
            CODING.model_copy(update={"first_stage": "bb"}),
            lambda x: [map_ * 0 for map_ in codes_of(x)],
            coder().device,
        ),
        progress=False,
    )
    assert other.coding.first_stage == "bb"
    assert int(StoredCodes(config, "train").read(range(18)).max()) == 0


def test_codes_of_another_first_stage_are_never_overwritten(config: DataConfig) -> None:
    made(config)
    with pytest.raises(UserError, match=r"keeps the codes of runs/a \(aa\); asked are those of runs/b \(bb\)"):
        made(config, first_stage="bb", made_by="runs/b")


def test_the_same_first_stage_by_another_name_is_the_same(config: DataConfig) -> None:
    assert made(config) == made(config, made_by="elsewhere/a")


def test_images_prepared_anew_have_no_codes(config: DataConfig, tmp_path: Path) -> None:
    made(config)
    for path in config.source.glob("*"):
        if "codes" not in path.name:
            path.unlink()
    image_folder(tmp_path / "others", [f"x{name}" for name in NAMES], size=SIZE)
    prepare(DataConfig(path=tmp_path / "others", size=SIZE), config.source, processes=1, progress=False)
    with pytest.raises(UserError, match="are of other images than train-00000"):
        StoredCodes(config, "train")
    assert "made of images that the store does not hold" in "\n".join(damaged_codes(config.source))


def test_damage_is_found(config: DataConfig) -> None:
    made(config)
    assert list(damaged_codes(config.source)) == []
    shard = config.source / code_file("train-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert [line.split(":")[0] for line in damaged_codes(config.source)] == [str(shard)]
    shard.write_bytes(b"")
    with pytest.raises(UserError, match="missing, damaged or truncated"):
        StoredCodes(config, "train").read([2])


def test_a_damaged_index_is_named(config: DataConfig) -> None:
    made(config)
    (config.source / CODES).write_text("{}")
    with pytest.raises(UserError, match=r"codes\.json: is of format None None"):
        StoredCodes(config, "train")


def test_what_is_seen_otherwise_in_training_is_refused(config: DataConfig) -> None:
    made(config, mirrored=False, padding=2)
    for update, message in (
        ({"flip": False}, "data.padding: is 0, but the codes"),
        ({"padding": 2}, "data.flip: is true"),
        ({"padding": 2, "flip": False, "crop": "random"}, "data.crop: random"),
    ):
        with pytest.raises(UserError, match=message):
            StoredCodes(config.model_copy(update=update), "train")


def test_images_that_change_at_every_draw_have_no_codes(config: DataConfig) -> None:
    with pytest.raises(UserError, match="binarize: a binarised image is drawn anew"):
        made(config.model_copy(update={"binarize": True}))
    with pytest.raises(UserError, match="has 65537 codes a level, stores keep up to 65536"):
        made(config, codes=2**16 + 1)


def test_random_crops_have_none(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", NAMES, size=SIZE)
    prepare(
        DataConfig(path=tmp_path / "images", size=SIZE, crop="random"), tmp_path / "store", processes=1, progress=False
    )
    with pytest.raises(UserError, match="crop: random shows another square in each epoch"):
        made(DataConfig(path=tmp_path / "store", size=SIZE))


def test_the_use_of_each_level_is_told(config: DataConfig) -> None:
    made(config)
    codes = StoredCodes(config, "train").read(range(18))
    used = len(codes[:, 1:].unique())
    lines = code_lines(config.source)
    assert lines[0] == "codes     of images, made by runs/a (aa), mirror images too"
    assert lines[2].startswith(f"  train level 1, 2×2: {used} of 5 in use, perplexity ")
    assert len(lines) == 5
