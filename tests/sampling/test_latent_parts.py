"""Parts of a file of latents: stopped and gone on, by any number of ranks, to the same bytes."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start
from ranks import run_ranks
from tiny_codecs import tiny_nvae

from nvae.core.errors import UserError
from nvae.core.files import lock
from nvae.data.config import DataConfig
from nvae.data.images import InMemory
from nvae.data.loading import Batch
from nvae.kernels.operations import using
from nvae.sampling import latent_parts
from nvae.sampling.encoding import Encoder, Kept
from nvae.sampling.latent_files import LatentFile
from nvae.sampling.latent_parts import ImageSet, Parts, spans_of, write_latents

BATCH, COUNTS = 4, (21, 7)
CONFIG = DataConfig(name="digits", binarize=True)
ABOUT = {"format": "nvae-latents", "version": "1"}


def sets() -> list[ImageSet]:
    random = np.random.default_rng(0)
    pixels = [torch.from_numpy(random.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)) for count in COUNTS]
    labels = [torch.arange(count) - 1 for count in COUNTS]
    names = [[f"{of}-{i}" for i in range(count)] for of, count in enumerate(COUNTS)]
    return [ImageSet(InMemory(x, labels=y), CONFIG, named) for x, y, named in zip(pixels, labels, names, strict=True)]


class Slow(Encoder):
    """Calls what it was given before each batch."""

    before: Callable[[], Any] = staticmethod(lambda: None)

    def rows(self, batch: Batch, numbers: Any) -> dict[str, np.ndarray]:
        self.before()
        return super().rows(batch, numbers)


def encode(out: Path, before: Callable[[], Any] | None = None, **kept: Any) -> int:
    """Two batches a part, drawn from the posteriors; how many images were there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the weights
    encoder = Slow(tiny_nvae(), Kept(**{"drawn": True, **kept}))
    if before is not None:
        encoder.before = before  # type: ignore[method-assign]
    latent_parts.PART, usual = 2 * BATCH * 4 * 64, latent_parts.PART
    try:
        with using("plain"):  # the last bits are those of the kernels
            return write_latents(out, encoder, sets(), ABOUT, {"seed": encoder.kept.seed}, BATCH)
    finally:
        latent_parts.PART = usual


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written at once."""
    out = tmp_path_factory.mktemp("whole") / "a.safetensors"
    assert encode(out) == 0
    return out


def test_parts_are_of_one_set_and_cover_every_image() -> None:
    spans = spans_of(COUNTS, 8)
    assert [(of, *places) for _, of, places in spans] == [
        (0, *range(8)), (0, *range(8, 16)), (0, *range(16, 21)), (1, *range(7)),
    ]  # fmt: skip


def test_a_file_has_every_image_once_in_order(whole: Path) -> None:
    file = LatentFile(whole)
    assert file.names == [f"{of}-{i}" for of, count in enumerate(COUNTS) for i in range(count)]
    assert file.labels is not None and file.labels.tolist() == [*range(-1, 20), *range(-1, 6)]
    assert not whole.with_name("a.safetensors.parts").exists()


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_what_was_stopped_goes_on_to_the_same_bytes(batches: int, whole: Path, tmp_path: Path) -> None:
    left = iter(range(batches))

    def stop() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "a.safetensors", stop)
    assert not (tmp_path / "a.safetensors").exists()
    assert encode(tmp_path / "a.safetensors") == {0: 0, 1: 0, 3: 8, 6: 21}[batches]
    assert (tmp_path / "a.safetensors").read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def slowly(out: Path) -> None:
    encode(out, lambda: time.sleep(0.2))


@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    process = start(slowly, tmp_path / "a.safetensors")
    while not list(tmp_path.rglob("0*.safetensors")):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert encode(tmp_path / "a.safetensors") >= 8
    assert (tmp_path / "a.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(whole: Path, tmp_path: Path) -> None:
    run_ranks(2, encode, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_part_is_made_again(whole: Path, tmp_path: Path) -> None:
    def stop_at_the_end() -> None:
        if (tmp_path / "a.safetensors.parts/00002.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "a.safetensors", stop_at_the_end)
    part = tmp_path / "a.safetensors.parts/00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert encode(tmp_path / "a.safetensors") == 13
    assert (tmp_path / "a.safetensors").read_bytes() == whole.read_bytes()


def stopped(out: Path, **kept: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        encode(out, lambda: 1 // 0, **kept)


def test_parts_of_something_else_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    stopped(out, seed=1)
    with pytest.raises(UserError, match=r"a\.npz\.parts: an earlier command left parts there with seed 1, asked is 0"):
        encode(out)
    (tmp_path / "a.npz.parts/made_of.json").write_text("{")
    with pytest.raises(UserError, match=r"made_of\.json: damaged; remove .*a\.npz\.parts"):
        encode(out, seed=1)


def test_a_folder_without_parts_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts/mine.txt").touch()
    with pytest.raises(UserError, match=r"a\.npz\.parts: holds something else than parts; remove it"):
        encode(tmp_path / "a.npz")
    assert [file.name for file in (tmp_path / "a.npz.parts").iterdir()] == ["mine.txt"]


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    stopped(tmp_path / "a.npz")
    with (
        lock(tmp_path / "a.npz.parts/.lock", wait=False),
        pytest.raises(UserError, match="another process writes there"),
    ):
        encode(tmp_path / "a.npz")


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    encoder = Encoder(tiny_nvae(), Kept(half=True))
    encoder.rows = lambda batch, numbers: {  # type: ignore[method-assign]
        name: np.where(np.arange(len(numbers)) == 2, np.inf, 0)[:, None, None, None].repeat(2, 1)
        for name in encoder.columns
    }
    with pytest.raises(UserError, match=r"0-2: z/00 is not finite in float64; try --precision fp32"):
        write_latents(tmp_path / "a.npz", encoder, sets(), ABOUT, {}, BATCH)
    assert not (tmp_path / "a.npz").exists()


def test_parts_lie_beside_the_file(tmp_path: Path) -> None:
    assert Parts(tmp_path / "x/a.npz", {}).folder == tmp_path / "x/a.npz.parts"
