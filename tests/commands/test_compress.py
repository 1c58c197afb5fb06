"""nvae-compress and nvae-decompress, and evaluate.py --compress."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entry_scripts import call, results_of
from PIL import Image
from places import ROOT
from tiny_run import tiny_run, train_in

from nvae.codec.archive import Archive, Entry, Index, write_archive
from nvae.codec.others import encoders, sheet
from nvae.core.errors import UserError

COLOUR = ("model.image_channels=3", "model.likelihood={kind: logistic_mixture, components: 2}", "data.binarize=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of binary digits."""
    runs = tmp_path_factory.mktemp("binary")
    assert train_in(runs, tiny_run("train.steps=2")) == "finished"
    return runs / "tiny"


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of photographs, 8×8."""
    folder, runs = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("colour")
    generator = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    options = ("data.name=images", f"data.path={folder}", "data.size=8", "data.channels=3", "train.steps=2")
    assert train_in(runs, tiny_run(*COLOUR, *options)) == "finished"
    return runs / "tiny"


def photographs(folder: Path) -> dict[str, np.ndarray]:
    """Of several sizes and kinds, by name."""
    generator, made = np.random.default_rng(1), {}
    for name, shape in {
        "a.png": (8, 8, 3),
        "trip/b.bmp": (19, 9, 3),
        "trip/c.png": (5, 11),
        "d.webp": (16, 16, 3),
    }.items():
        file, pixels = folder / name, generator.integers(0, 256, shape, dtype=np.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, **({"lossless": True} if name.endswith("webp") else {}))
        made[name] = pixels
    return made


def test_a_folder_comes_back_as_it_was(colour: Path, tmp_path: Path, capsys: Any) -> None:
    made = photographs(tmp_path / "in")
    assert call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz", "--chain", 4, "--verify") == 0
    assert "every image comes back" in capsys.readouterr().out
    assert call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "out") == 0
    for name, pixels in made.items():
        found = Image.open((tmp_path / "out" / name).with_suffix(".png"))
        np.testing.assert_array_equal(np.asarray(found), pixels)


def test_a_split_of_the_run_comes_back_as_it_is_evaluated(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert call("scripts/compress", run, "test", tmp_path / "a.nvz", "--limit", 5) == 0
    assert "bits/dim" in capsys.readouterr().out
    assert call("scripts/decompress", run, tmp_path / "a.nvz", tmp_path / "out") == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"test-{place:06d}.png" for place in range(5)]
    assert set(np.unique(np.asarray(Image.open(files[0])))) == {0, 255}


def test_every_image_of_a_store_is_compressed_once(colour: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    call(
        "scripts/prepare", tmp_path / "in", tmp_path / "store", "size=8", "channels=3", "enlarge=true", "--processes", 1
    )
    call("scripts/compress", colour, tmp_path / "store", tmp_path / "a.nvz")
    assert [entry.name for entry in Archive(tmp_path / "a.nvz").index.images] == [f"test-{i:06d}" for i in range(4)]


def test_single_images_are_given_by_name(colour: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    assert call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "out", "--only", "trip/c.png") == 0
    assert [file.name for file in (tmp_path / "out").rglob("*.png")] == ["c.png"]
    with pytest.raises(UserError, match=r"no image named nowhere\.png"):
        call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "o", "--only", "nowhere.png")


def test_an_archive_says_what_it_holds(colour: Path, tmp_path: Path, capsys: Any) -> None:
    photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    assert call("scripts/decompress", colour, tmp_path / "a.nvz", "--describe") == 0
    printed = capsys.readouterr().out
    assert "4 images" in printed and "constriction" in printed and "1 of 19×9" in printed


def test_lost_images_are_named_and_the_code_is_1(colour: Path, tmp_path: Path, capsys: Any) -> None:
    photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz", "--chain", 1)
    archive, data = Archive(tmp_path / "a.nvz"), bytearray((tmp_path / "a.nvz").read_bytes())
    data[archive.begins(0) + 20] ^= 1
    (tmp_path / "a.nvz").write_bytes(data)
    assert call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "out") == 1
    assert "lost: a.png: " in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("transparent", "RGBA pixels"),
        ("deep", "I;16 pixels"),
        ("grey for black and white", "has grey values"),
        ("colour for grey", "takes grey images"),
    ],
)
def test_images_that_would_not_come_back_are_refused(
    run: Path, colour: Path, tmp_path: Path, kind: str, reason: str
) -> None:
    images = {
        "transparent": Image.new("RGBA", (8, 8)),
        "deep": Image.fromarray(np.zeros((8, 8), dtype=np.uint16)),
        "grey for black and white": Image.new("L", (8, 8), 7),
        "colour for grey": Image.new("RGB", (8, 8)),
    }
    images[kind].save(tmp_path / "x.png")
    with pytest.raises(UserError, match=reason):
        call("scripts/compress", run if " for " in kind else colour, tmp_path, tmp_path / "a.nvz")
    assert not (tmp_path / "a.nvz").exists()


def test_nothing_is_written_over(colour: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    with pytest.raises(UserError, match=r"a\.nvz: exists"):
        call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/d.png").write_text("mine")
    with pytest.raises(UserError, match=r"d\.png: exists"):
        call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").rglob("*")] == ["d.png"]


@pytest.mark.parametrize("name", ["../x.png", "/tmp/x.png", "a/../../x.png", "..\\x.png"])
def test_names_that_lead_out_of_the_folder_are_refused(colour: Path, tmp_path: Path, name: str) -> None:
    photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    archive = Archive(tmp_path / "a.nvz")
    index = Index(**{**vars(archive.index), "images": [Entry(name, 8, 8), *archive.index.images[1:]]})
    write_archive(tmp_path / "b.nvz", index, [archive.chain(number) or b"" for number in range(len(index.parts))])
    with pytest.raises(UserError, match="leads out of the folder"):
        call("scripts/decompress", colour, tmp_path / "b.nvz", tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()


def test_another_run_is_refused(run: Path, colour: Path, tmp_path: Path) -> None:
    call("scripts/compress", run, "test", tmp_path / "a.nvz", "--limit", 2)
    with pytest.raises(UserError, match="another model"):
        call("scripts/decompress", colour, tmp_path / "a.nvz", tmp_path / "out")


def test_real_bits_stand_beside_the_bound_and_other_formats(run: Path, capsys: Any) -> None:
    assert call("evaluate", run, "--compress", "--limit", 20) == 0
    (entry,) = (entry for entry in results_of(run).values() if entry["metric"] == "compression")
    assert entry["images"] == 20 and entry["dims"] == 20 * 64
    assert entry["net"] == pytest.approx(entry["bound"], rel=0.1)
    assert entry["net"] + entry["begun"] < entry["file"]
    assert {"PNG", "WebP", "gzip"} <= set(entry["others"])
    printed = capsys.readouterr().out
    assert "negative ELBO" in printed and "PNG, all in one picture" in printed
    assert Image.open(run / "compression.png").width > 300


@pytest.mark.parametrize(("levels", "colours"), [(1, 1), (255, 1), (255, 3)])
def test_other_formats_are_lossless(levels: int, colours: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, levels + 1, (colours, 9, 7)).astype(np.uint8)
    wanted = np.moveaxis(x * (255 // levels), 0, -1)
    for name in ("PNG", "WebP"):
        (tmp_path / name).write_bytes(encoders(levels)[name](x))
        found = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        np.testing.assert_array_equal(found, np.broadcast_to(wanted, found.shape))


def test_a_sheet_holds_every_image() -> None:
    images = [np.full((1, 2, 2), number) for number in range(1, 6)]
    np.testing.assert_array_equal(sheet(images)[0, ::2, ::2], [[1, 2, 3], [4, 5, 0]])


# ---------------------------------------------------------------------------------------------------- other machines

MACHINES = {
    "two threads": {"OMP_NUM_THREADS": "2"},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "narrow vectors": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_other_arithmetic_gives_the_same_images(colour: Path, tmp_path: Path, machine: str) -> None:
    made = photographs(tmp_path / "in")
    call("scripts/compress", colour, tmp_path / "in", tmp_path / "a.nvz")
    command = [sys.executable, "scripts/decompress.py", str(colour), str(tmp_path / "a.nvz"), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **MACHINES[machine]}, check=True)
    for name, pixels in made.items():
        found = np.asarray(Image.open((tmp_path / "out" / name).with_suffix(".png")))
        np.testing.assert_array_equal(found, pixels)
