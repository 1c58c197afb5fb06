"""nvae-encode: images to a file of latents, and back to pictures."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entry_scripts import call
from PIL import Image
from places import ROOT
from ranks import run_ranks
from tiny_run import EVERY_BRICK, TINY, VERY_DEEP, tiny_run, train_in
from tiny_vqvae import first_config, prior_config

from nvae.commands.encode import image_sets
from nvae.commands.subject import open_subject
from nvae.core.errors import UserError
from nvae.data.loading import evaluation_batches
from nvae.data.sets import open_images
from nvae.sampling.latent_files import LatentFile
from nvae.sampling.latent_space import decode
from nvae.sampling.pictures import to_bytes
from nvae.training.config import run_config

CPU = torch.device("cpu")
PLAIN = ("train.kernels=plain",)
"""Of one update, nothing is compiled."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an NVAE of three groups."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    assert train_in(folder, tiny_run("name=nvae", *EVERY_BRICK, "train.steps=1", *PLAIN)) == "finished"
    return folder / "nvae"


@pytest.fixture(scope="module")
def others(run: Path) -> Path:
    """Beside it, one of every other family."""
    train = {**TINY["train"], "steps": 1, "kernels": "plain"}
    deep = run_config({**TINY, "name": "vdvae", "model": VERY_DEEP, "train": train}, "vdvae")
    assert train_in(run.parent, deep) == "finished"
    assert train_in(run.parent, first_config("name=vqvae", "train.steps=1", *PLAIN)) == "finished"
    assert train_in(run.parent, prior_config(run.parent / "vqvae", "train.steps=1", *PLAIN)) == "finished"
    return run.parent


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        file.relative_to(folder).as_posix(): np.asarray(Image.open(file))
        for file in sorted(folder.rglob("*.png"))
    }  # fmt: skip


def photographs(folder: Path) -> list[str]:
    """The names of some, in two classes, of other sizes than the model's."""
    random, names = np.random.default_rng(0), ["cat/a.png", "cat/c.bmp", "dog/b.webp"]
    for name, shape in zip(names, ((8, 8), (20, 11), (16, 16, 3)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return names


# --------------------------------------------------------------------------------------------------- there and back


def there_and_back(run: Path, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Pictures are what the model makes of the same latents."""
    out = file.with_suffix("")
    assert call("scripts/encode", run, "test", file, "--limit", 5) == 0
    assert call("scripts/encode", run, file, out, "--decode") == 0
    z = [torch.from_numpy(array.copy()).to(dtype) for array in LatentFile(file).rows(0, 5)]
    wanted = to_bytes(decode(open_subject(run, device=CPU).model.for_inference(), z))[:, 0].numpy()
    found = pixels_of(out)
    assert list(found) == [f"digits[{place}].png" for place in range(5)]
    np.testing.assert_array_equal(np.stack(list(found.values())), wanted)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_pictures_are_what_the_model_makes_of_the_same_latents(ending: str, run: Path, tmp_path: Path) -> None:
    there_and_back(run, tmp_path / f"a{ending}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("vdvae", torch.float32), ("vqvae", torch.int64), ("prior", torch.int64)]
)
def test_so_they_are_of_other_families(family: str, dtype: torch.dtype, others: Path, tmp_path: Path) -> None:
    there_and_back(others / family, tmp_path / "a.safetensors", dtype)


def test_latents_are_of_the_images_that_are_evaluated(run: Path, tmp_path: Path) -> None:
    call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 5)
    subject = open_subject(run, device=CPU)
    images = open_images(subject.data, "test")
    (batch,) = evaluation_batches(images, subject.data, batch=5, device=CPU, seed=0, stop=5)
    model = subject.model.for_inference()
    with torch.no_grad():
        output = model.decode(model.encode(batch.images), noise=[torch.zeros(s) for s in model.latent_shapes(5)])
    found = np.load(tmp_path / "a.npz")
    for group, z in enumerate(output.z):
        np.testing.assert_allclose(found[f"z/{group:02d}"], z.numpy(), atol=1e-5)
    assert found["labels"].tolist() == batch.labels.tolist()


def test_half_as_many_bits_give_nearly_the_same_pictures(run: Path, tmp_path: Path) -> None:
    for name, options in (("whole", ()), ("half", ("--float16",))):
        call("scripts/encode", run, "test", tmp_path / f"{name}.npz", "--limit", 5, *options)
        call("scripts/encode", run, tmp_path / f"{name}.npz", tmp_path / name, "--decode")
    whole, half = (np.stack(list(pixels_of(tmp_path / name).values())).astype(int) for name in ("whole", "half"))
    assert np.abs(whole - half).max() <= 1


def test_groups_that_are_not_there_are_drawn_from_the_prior(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    call("scripts/encode", run, "test", file, "--limit", 3, "--groups", 1)
    assert [name for name in np.load(file).files if name.startswith("z/")] == ["z/00"]
    made = {}
    for name, options in {
        "cold": ("--temperature", 0),
        "warm": (),
        "again": ("--batch", 2),
        "other": ("--seed", 1),
    }.items():
        call("scripts/encode", run, file, tmp_path / name, "--decode", *options)
        made[name] = np.stack(list(pixels_of(tmp_path / name).values())).astype(int)
    model = open_subject(run, device=CPU).model.for_inference()
    wanted = to_bytes(decode(model, [torch.from_numpy(np.load(file)["z/00"])], temperature=0.0))[:, 0].numpy()
    np.testing.assert_array_equal(made["cold"], wanted)
    assert np.abs(made["warm"] - made["again"]).max() <= 1
    assert np.abs(made["warm"] - made["other"]).max() > 1


def test_a_class_is_told_both_ways(tmp_path: Path) -> None:
    assert train_in(tmp_path, tiny_run("model.classes=10", "train.steps=1", *PLAIN)) == "finished"
    run, file = tmp_path / "tiny", tmp_path / "a.npz"
    call("scripts/encode", run, "test", file, "--limit", 4)
    content = dict(np.load(file))
    np.savez(tmp_path / "b.npz", **{**content, "labels": (content["labels"] + 1) % 10})
    np.savez(tmp_path / "c.npz", **{**content, "labels": content["labels"] + 100})
    subject = open_subject(run, device=CPU)
    for name, labels in (("a", content["labels"]), ("b", (content["labels"] + 1) % 10)):
        call("scripts/encode", run, tmp_path / f"{name}.npz", tmp_path / name, "--decode")
        z = [torch.from_numpy(content[f"z/{group:02d}"]) for group in range(2)]
        wanted = to_bytes(decode(subject.model.for_inference(), z, labels=torch.from_numpy(labels)))[:, 0].numpy()
        np.testing.assert_array_equal(np.stack(list(pixels_of(tmp_path / name).values())), wanted)
    with pytest.raises(UserError, match="labels"):
        call("scripts/encode", run, tmp_path / "c.npz", tmp_path / "c", "--decode")
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------------------ images


def test_a_folder_keeps_names_and_classes(run: Path, tmp_path: Path) -> None:
    names = photographs(tmp_path / "in")
    call("scripts/encode", run, tmp_path / "in", tmp_path / "a.safetensors")
    file = LatentFile(tmp_path / "a.safetensors")
    assert file.names == names
    assert file.labels is not None and file.labels.tolist() == [0, 0, 1]
    call("scripts/encode", run, tmp_path / "a.safetensors", tmp_path / "out", "--decode")
    assert list(pixels_of(tmp_path / "out")) == ["cat/a.png", "cat/c.png", "dog/b.png"]


def test_a_zip_gives_what_its_folder_gives(run: Path, tmp_path: Path) -> None:
    names = photographs(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "in" / name, name)
    for source in ("in", "in.zip"):
        call("scripts/encode", run, tmp_path / source, tmp_path / f"{source}.npz")
    folder, packed = (np.load(tmp_path / f"{source}.npz") for source in ("in", "in.zip"))
    assert folder["names"].tolist() == packed["names"].tolist()
    np.testing.assert_array_equal(folder["z/00"], packed["z/00"])


def test_images_of_several_splits_are_named_by_them(run: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        photographs(tmp_path / "in" / split)
    call("scripts/encode", run, tmp_path / "in", tmp_path / "a.npz", "--limit", 5)
    assert np.load(tmp_path / "a.npz")["names"].tolist() == [
        "train/cat/a.png", "train/cat/c.bmp", "train/dog/b.webp", "test/cat/a.png", "test/cat/c.bmp",
    ]  # fmt: skip


def test_names_that_two_splits_have_begin_with_the_split(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        photographs(tmp_path / "in" / split)
    monkeypatch.setattr("nvae.commands.encode.names_of", lambda config, split: ["a", "b"])
    sets = image_sets(open_subject(run, device=CPU), str(tmp_path / "in"), 3)
    assert [chosen.names for chosen in sets] == [["train/a", "train/b"], ["test/a"]]


def test_images_of_a_store_have_numbers(run: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    call("scripts/prepare", tmp_path / "in", tmp_path / "store", "size=8", "channels=1", "--processes", 1)
    call("scripts/encode", run, tmp_path / "store", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["names"].tolist() == [f"test-{place:06d}" for place in range(3)]


def test_images_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    (tmp_path / "in/cat/b.png").write_text("no image")
    with pytest.raises(UserError, match=r"an image can't be used(.|\n)*cat/b\.png"):
        call("scripts/encode", run, tmp_path / "in", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_a_file_says_what_made_it(run: Path, tmp_path: Path) -> None:
    call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2, "--moments", "--draw", "--seed", 4)
    found = np.load(tmp_path / "a.npz")
    about = json.loads(str(found["metadata"]))
    subject = open_subject(run, device=CPU)
    assert about["model"] == subject.fingerprint and about["config"] == "nvae" and about["family"] == "NVAE"
    assert about["latents"] == "posterior draws" and about["seed"] == "4"
    assert json.loads(about["shapes"]) == [list(shape[1:]) for shape in subject.model.latent_shapes(1)]
    groups = range(3)
    assert {f"{kind}/{group:02d}" for kind in ("z", "mean", "scale") for group in groups} <= set(found.files)


# -------------------------------------------------------------------------------------------------------- in Python


@pytest.fixture
def blocks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The examples of docs/latents.md by name, and the files that they read where they run."""
    for name, options in {
        "train.npz": ("--limit", 600),
        "test.npz": (),
        "latents.safetensors": ("--limit", 12),
    }.items():
        call("scripts/encode", run, name.split(".")[0].replace("latents", "test"), tmp_path / name, *options)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/latents.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^```python\n# ([\w ]+):[^\n]*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


def test_the_classifier_of_the_page_tells_digits(blocks: dict[str, str]) -> None:
    found: dict[str, Any] = {}
    exec(blocks["numpy"], found)
    assert found["classifier"].score(found["x_test"], found["y_test"]) > 0.6


def test_what_the_page_changes_is_decoded(blocks: dict[str, str], run: Path) -> None:
    found: dict[str, Any] = {}
    exec(blocks["safetensors"], found)
    assert found["names"] == [f"digits[{place}]" for place in range(12)]
    assert call("scripts/encode", run, "changed.safetensors", "changed", "--decode") == 0
    assert len(list(Path("changed").iterdir())) == 12


# ---------------------------------------------------------------------------------------------------------- refusals


def test_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(UserError, match=r"a\.npz: exists; give another name, or --force"):
        call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2)
    assert call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2, "--force") == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out/digits[1].png").write_text("mine")
    with pytest.raises(UserError, match=r"digits\[1\]\.png: exists"):
        call("scripts/encode", run, tmp_path / "a.npz", tmp_path / "out", "--decode")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["digits[1].png"]


def test_latents_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2)
    with pytest.raises(UserError, match=r"a\.npz: is of another model than .*: of NVAE 'nvae', ema weights"):
        call("scripts/encode", run, tmp_path / "a.npz", tmp_path / "out", "--decode", "--weights", "raw")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("test", "a.pt"), r"a\.pt: a file of latents ends in \.safetensors or \.npz"),
        (("nowhere", "a.npz"), "nowhere does not exist"),
        (("test", "a.npz", "--temperature", "1"), "--temperature: has no effect on encoding, only on --decode"),
        (("a.npz", "out", "--decode", "--float16"), "--float16: has no effect on --decode, only on encoding"),
        (("test", "a.npz", "--groups", "4"), "--groups: the model has 3 latent groups, found 4"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], reason: str, run: Path, tmp_path: Path) -> None:
    placed = (tmp_path / word if word in ("a.npz", "a.pt", "out") else word for word in arguments)
    with pytest.raises(UserError, match=reason):
        call("scripts/encode", run, *placed)
    assert not list(tmp_path.iterdir())


def test_a_temperature_below_zero_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2, "--groups", 1)
    with pytest.raises(UserError, match="temperature: must be 0 or more"):
        call("scripts/encode", run, tmp_path / "a.npz", tmp_path / "out", "--decode", "--temperature", -1)
    assert not (tmp_path / "out").exists()


def test_a_temperature_for_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    call("scripts/encode", run, "test", tmp_path / "a.npz", "--limit", 2)
    with pytest.raises(UserError, match=r"--temperature: has no effect, .* holds every group"):
        call("scripts/encode", run, tmp_path / "a.npz", tmp_path / "out", "--decode", "--temperature", 0.7)


# ------------------------------------------------------------------------------------------------------- several ranks


def both_ways(run: Path, folder: Path) -> None:
    call("scripts/encode", run, "test", folder / "a.npz", "--limit", 50, "--batch", 8, "--kernels", "plain")
    call("scripts/encode", run, folder / "a.npz", folder / "out", "--decode", "--batch", 8, "--kernels", "plain")


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    both_ways(run, one)
    run_ranks(2, both_ways, run, two)
    assert (one / "a.npz").read_bytes() == (two / "a.npz").read_bytes()
    for name, picture in pixels_of(one / "out").items():
        np.testing.assert_array_equal(picture, pixels_of(two / "out")[name])
