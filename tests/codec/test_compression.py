"""Archives: whole images in, whole images out or named as lost."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from tiny_codecs import COLOUR, MODELS, tiny_nvae

from nvae.codec.archive import MAGIC, Archive
from nvae.codec.compression import Lost, Picture, compress, decompress, require_made_by
from nvae.core.errors import UserError

MODEL = MODELS["codes"]()
"""Quick, and without latents."""


def pictures(count: int, colours: int = 1, levels: int = 1, seed: int = 0) -> list[Picture]:
    """Of several sizes."""
    generator = np.random.default_rng(seed)
    sizes = [(8, 8), (8, 8), (5, 20), (9, 3)]
    return [
        Picture(f"folder/{place}.png", generator.integers(0, levels + 1, (colours, *sizes[place % 4])).astype(np.uint8))
        for place in range(count)
    ]


def packed(path: Path, count: int = 10, chain: int = 3) -> list[Picture]:
    """An archive of so many pictures."""
    made = pictures(count)
    compress(MODEL, made, path, chain=chain, at_once=2, progress=False)
    return made


def assert_same(found: Picture | Lost, wanted: Picture) -> None:
    assert isinstance(found, Picture), found
    assert found.name == wanted.name
    np.testing.assert_array_equal(found.levels, wanted.levels)


@pytest.mark.parametrize("kind", MODELS)
def test_pictures_of_any_size_come_back(tmp_path: Path, kind: str) -> None:
    model, path = MODELS[kind](), tmp_path / "a.nvz"
    levels = 1 if model.config.likelihood.kind == "bernoulli" else 255
    made = pictures(5, model.config.image_channels, levels)
    compress(model, made, path, chain=3, at_once=2, progress=False)
    found = list(decompress(model, Archive(path), progress=False))
    for image, wanted in zip(found, made, strict=True):
        assert_same(image, wanted)


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nvz", "b.nvz"):
        packed(tmp_path / name)
    assert (tmp_path / "a.nvz").read_bytes() == (tmp_path / "b.nvz").read_bytes()


def test_how_many_chains_go_at_once_does_not_matter(tmp_path: Path) -> None:
    model, made = tiny_nvae(), pictures(7)
    for at_once in (1, 5):
        compress(model, made, tmp_path / f"{at_once}.nvz", chain=2, at_once=at_once, progress=False)
    one, five = (Archive(tmp_path / f"{at_once}.nvz").index for at_once in (1, 5))
    assert one.images == five.images
    for at_once in (1, 5):
        for image, wanted in zip(decompress(model, Archive(tmp_path / "5.nvz"), at_once=at_once), made, strict=True):
            assert_same(image, wanted)


def test_one_image_is_read_from_its_chain_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = packed(tmp_path / "a.nvz")
    archive, read = Archive(tmp_path / "a.nvz"), []
    chain = archive.chain
    monkeypatch.setattr(archive, "chain", lambda number: read.append(number) or chain(number))
    place = 6  # squares: 1 1 3 2, again and again; the seventh image has those from 9 to 11
    assert_same(next(iter(decompress(MODEL, archive, [place], progress=False))), made[place])
    assert read == [3]


def test_what_images_take_is_told_without_what_chains_begin_with(tmp_path: Path) -> None:
    made = compress(tiny_nvae(), pictures(7), tmp_path / "a.nvz", chain=4, progress=False)
    index = made.index
    words = 8 * index.body - sum(8 * 4 * (1 + length) for length in index.chain_lengths())  # notes, checksums
    assert made.bits.sum() == pytest.approx(words - index.begun, abs=96 * len(index.parts))


# --------------------------------------------------------------------------------------------------- another model


def test_a_model_that_differs_in_one_weight_is_refused(tmp_path: Path) -> None:
    model = tiny_nvae()
    compress(model, pictures(2), tmp_path / "a.nvz", progress=False)
    require_made_by(Archive(tmp_path / "a.nvz"), model, "same")
    with torch.no_grad():
        weight = next(model.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    with pytest.raises(UserError, match="another model than other"):
        require_made_by(Archive(tmp_path / "a.nvz"), model, "other")


def test_a_machine_that_computes_otherwise_gives_no_wrong_pixels(tmp_path: Path) -> None:
    model, made = tiny_nvae(), pictures(8)
    compress(model, made, tmp_path / "a.nvz", chain=4, progress=False)
    other = tiny_nvae()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.001
    found = list(decompress(other, Archive(tmp_path / "a.nvz"), progress=False))
    lost = [image for image in found if isinstance(image, Lost)]
    assert lost
    assert all("computes otherwise" in image.reason for image in lost)
    for image, wanted in zip(found, made, strict=True):
        if isinstance(image, Picture):
            assert_same(image, wanted)


def test_what_no_model_can_do_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="flows"):
        compress(tiny_nvae(flows=1), pictures(2), tmp_path / "a.nvz", progress=False)
    with pytest.raises(UserError, match="no probability"):
        compress(tiny_nvae(**{**COLOUR, "likelihood": {"kind": "normal"}}), pictures(2, 3, 255), tmp_path / "a.nvz")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes, random: Random) -> bytes:
    """Cut short at either end, with bytes changed, a stretch missing, doubled or blank."""
    kind = random.choice(("short", "late", "changed", "missing", "doubled", "blank"))
    here, length = random.randrange(len(data)), random.randrange(1, 40)
    if kind == "short":
        return data[:here]
    if kind == "late":
        return data[here:]
    if kind == "changed":
        changed = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            changed[random.randrange(len(data))] ^= random.randrange(1, 256)
        return bytes(changed)
    middle = {
        "missing": b"",
        "doubled": 2 * data[here : here + length],
        "blank": bytes(len(data[here : here + length])),
    }
    return data[:here] + middle[kind] + data[here + length :]


def test_of_damaged_files_every_image_is_right_or_named_as_lost(tmp_path: Path) -> None:
    made = packed(tmp_path / "a.nvz")
    data, path, random = (tmp_path / "a.nvz").read_bytes(), tmp_path / "b.nvz", Random(0)
    right = lost = refused = 0
    for _ in range(200):
        path.write_bytes(damaged(data, random))
        try:
            archive = Archive(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        for image, wanted in zip(decompress(MODEL, archive, progress=False), made, strict=True):
            assert image.name == wanted.name
            if isinstance(image, Lost):
                lost += 1
            else:
                assert_same(image, wanted)
                right += 1
    assert min(right, lost) > 300
    assert refused < 60


def test_chains_before_a_cut_are_all_there(tmp_path: Path) -> None:
    made = packed(tmp_path / "a.nvz")
    archive = Archive(tmp_path / "a.nvz")
    whole = (tmp_path / "a.nvz").read_bytes()
    end = archive.begins(2)
    (tmp_path / "b.nvz").write_bytes(whole[:end])
    found = list(decompress(MODEL, Archive(tmp_path / "b.nvz"), progress=False))
    starts = np.cumsum([0, *(entry.squares(8) for entry in archive.index.images)])
    for image, wanted, last in zip(found, made, starts[1:], strict=True):
        assert isinstance(image, Picture) == (last <= 2 * 3)
        if isinstance(image, Picture):
            assert_same(image, wanted)


@pytest.mark.parametrize("data", [b"", b"nonsense", MAGIC, MAGIC + bytes(100), 2 * MAGIC])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.nvz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.nvz"):
        Archive(tmp_path / "a.nvz")
