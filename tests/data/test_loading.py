"""Batches: any position, rank and worker count shows the same images, each exactly once an epoch."""

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from stand_ins import file_bytes, image_folder, smooth
from torch import Tensor

from nvae.core.errors import UserError
from nvae.data import fetching
from nvae.data.config import DataConfig
from nvae.data.images import CENTRE, Crop, Images, InMemory
from nvae.data.loading import Batch, TrainingStream, evaluation_batches
from nvae.data.sets import open_images

CPU = torch.device("cpu")


def numbered(count: int, channels: int = 1, size: int = 4) -> InMemory:
    """Images whose top left pixel is their position in the split; the top right one is 255."""
    pixels = torch.zeros(count, channels, size, size, dtype=torch.uint8)
    pixels[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    pixels[:, :, 0, -1] = 255
    return InMemory(pixels)


class Lazy(Images):
    """Images that are read one by one; oblong, so that crops matter."""

    movable = True

    def __init__(self, whole: InMemory, bad: int | None = None, deadly: int | None = None) -> None:
        self.whole = whole
        self.shape = whole.shape
        self.bad = bad
        self.deadly = deadly

    def __len__(self) -> int:
        return len(self.whole)

    def read_into(self, out: Tensor, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> None:
        if self.bad in indices:
            raise UserError(f"image {self.bad} is bad")
        if self.deadly in indices:
            os._exit(3)
        self.whole.read_into(out, indices)
        places = [round(100 * across) for _, across in crops or [CENTRE] * len(indices)]
        out[:, -1, -1, 0] = torch.tensor(places, dtype=torch.uint8)


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"size": 4, "channels": 1, "batch": 3, "workers": 0, **fields})


def stream(images: Images, rank: int = 0, world: int = 1, seed: int = 0, **fields: Any) -> TrainingStream:
    return TrainingStream(images, config(**fields), seed=seed, device=CPU, rank=rank, world=world)


def shown(batches: Sequence[Batch]) -> list[int]:
    """Positions in the split of the images of some batches."""
    return [round(255 * float(image[0, 0, 0])) for batch in batches for image in batch.images]


def take(images: Images, count: int, start: int = 0, **fields: Any) -> list[Batch]:
    return list(islice(stream(images, **fields).batches(start), count))


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.indices == b.indices and torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------- order


def test_every_epoch_shows_each_image_once() -> None:
    """Ten images in batches of three: epochs end inside batches."""
    order = shown(take(numbered(10), 10))
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = shown(take(numbered(50), 50))
    assert order[:50] != order[50:100]


def test_another_seed_is_another_order() -> None:
    assert shown(take(numbered(50), 5)) != shown(take(numbered(50), 5, seed=1))


def test_a_batch_may_be_larger_than_the_set() -> None:
    (batch,) = take(numbered(2), 1, batch=7)
    assert sorted(shown([batch])) == [0] * 3 + [1] * 4 or sorted(shown([batch])) == [0] * 4 + [1] * 3


@pytest.mark.parametrize("start", [1, 7, 10, 23, 1000])
def test_a_stream_continues_from_any_image(start: int) -> None:
    whole = torch.cat([batch.images for batch in take(numbered(10), 350, flip=True)])
    resumed = take(numbered(10), 3, start=start, flip=True)
    assert torch.equal(torch.cat([batch.images for batch in resumed]), whole[start : start + 9])
    assert [i for batch in resumed for i in batch.indices] == list(range(start, start + 9))


def test_ranks_share_the_sequence_in_micro_batches() -> None:
    """Micro-batch a of rank r holds draws start + (a·world + r)·batch and the batch − 1 after it."""
    per_rank = [take(numbered(10), 3, start=5, rank=rank, world=2) for rank in range(2)]
    assert [batch.indices for batch in per_rank[1]] == [[8, 9, 10], [14, 15, 16], [20, 21, 22]]
    interleaved = [batch for pair in zip(*per_rank, strict=True) for batch in pair]
    assert same(interleaved, take(numbered(10), 6, start=5))


def test_an_image_is_drawn_the_same_in_any_batch_size() -> None:
    fields = {"flip": True, "binarize": True}
    small = torch.cat([b.images for b in take(numbered(10), 8, batch=3, **fields)])
    large = torch.cat([b.images for b in take(numbered(10), 2, batch=12, **fields)])
    assert torch.equal(small, large)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_about_half_of_the_draws_are_mirrored() -> None:
    draws = torch.cat([batch.images for batch in take(numbered(10), 400, batch=10, flip=True)])
    mirrored = (draws[:, 0, 0, 0] == 1).float().mean()  # the white corner is on the left
    assert abs(float(mirrored) - 0.5) < 0.03


def test_a_mirrored_image_is_the_image_from_right_to_left() -> None:
    images = numbered(10)
    for batch in take(images, 5, flip=True):
        plain = stream(images)
        for image, draw in zip(batch.images, batch.indices, strict=True):
            original = images.pixels[plain.position(draw)] / 255
            assert torch.equal(image, original) or torch.equal(image, original.flip(2))


def test_nothing_is_mirrored_unasked() -> None:
    assert all(bool((batch.images[:, :, 0, -1] == 1).all()) for batch in take(numbered(10), 10))


def test_padding_is_zeros_around_the_image() -> None:
    (batch,) = take(numbered(10), 1, padding=2)
    assert batch.images.shape == (3, 1, 8, 8)
    (plain,) = take(numbered(10), 1)
    assert torch.equal(batch.images[:, :, 2:-2, 2:-2], plain.images)
    assert int(batch.images.count_nonzero()) == int(plain.images.count_nonzero())


def test_grey_values_are_over_the_levels() -> None:
    images = InMemory(torch.full((3, 1, 4, 4), 4, dtype=torch.uint8), levels=16)
    (batch,) = take(images, 1)
    assert bool((batch.images == 0.25).all())


def test_eight_bit_values_are_exact_fractions() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    (batch,) = take(InMemory(values), 1, batch=1)
    assert torch.equal(batch.images, values.to(torch.float32) / 255)


def test_binarised_images_are_black_and_white_with_the_mean_of_the_grey_value() -> None:
    images = InMemory(torch.full((10, 1, 4, 4), 51, dtype=torch.uint8))
    draws = torch.cat([batch.images for batch in take(images, 1000, batch=10, binarize=True)])
    assert draws.unique().tolist() == [0, 1]
    assert abs(float(draws.mean()) - 0.2) < 0.004


def test_training_draws_new_binary_images_every_epoch() -> None:
    images = InMemory(torch.full((1, 1, 8, 8), 128, dtype=torch.uint8))
    first, second = take(images, 2, batch=1, binarize=True)
    assert not torch.equal(first.images, second.images)


def test_pixels_in_memory_are_not_changed() -> None:
    images = numbered(10)
    before = images.pixels.clone()
    take(images, 10, flip=True)
    assert torch.equal(images.pixels, before)


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(images: Images, **options: Any) -> list[Batch]:
    given = {"batch": 4, "device": CPU, "seed": 0, **options}
    return list(evaluation_batches(images, config(**given.pop("fields", {})), **given))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("count", [1, 10, 29])
def test_evaluation_shows_every_image_once_over_all_ranks(count: int, world: int) -> None:
    shares = [evaluate(numbered(count), rank=rank, world=world) for rank in range(world)]
    assert [i for share in shares for batch in share for i in batch.indices] == list(range(count))
    assert [i for share in shares for i in shown(share)] == list(range(count))


def test_ranks_have_shares_that_differ_by_one_image_at_most() -> None:
    sizes = [sum(len(b.indices) for b in evaluate(numbered(29), rank=rank, world=4)) for rank in range(4)]
    assert max(sizes) - min(sizes) <= 1


def test_the_last_batch_of_evaluation_is_smaller() -> None:
    assert [len(batch.images) for batch in evaluate(numbered(10))] == [4, 4, 2]


def test_evaluation_can_start_and_stop_anywhere() -> None:
    assert [batch.indices for batch in evaluate(numbered(10), start=3, stop=9)] == [[3, 4, 5, 6], [7, 8]]


def test_evaluation_never_mirrors() -> None:
    assert same(evaluate(numbered(10), fields={"flip": True}), evaluate(numbered(10)))


def test_evaluation_binarises_the_same_every_time_whatever_the_batch_and_rank() -> None:
    images = InMemory(torch.full((10, 1, 8, 8), 128, dtype=torch.uint8))
    fields = {"binarize": True}
    whole = torch.cat([batch.images for batch in evaluate(images, fields=fields)])
    second = [b for rank in range(3) for b in evaluate(images, fields=fields, batch=2, rank=rank, world=3)]
    assert torch.equal(whole, torch.cat([batch.images for batch in second]))


def test_another_draw_binarises_anew() -> None:
    images = InMemory(torch.full((4, 1, 8, 8), 128, dtype=torch.uint8))
    (first,), (second,) = (evaluate(images, fields={"binarize": True}, draw=draw) for draw in (0, 1))
    assert not torch.equal(first.images, second.images)


# --------------------------------------------------------------------------------------------------- loader processes


def test_loader_processes_change_nothing() -> None:
    """Enough batches that every slot of the shared memory is used several times."""
    images = Lazy(numbered(40))
    assert same(take(images, 40, workers=2, flip=True, start=7), take(images, 40, flip=True, start=7))


def test_evaluation_through_loader_processes_changes_nothing() -> None:
    images = Lazy(numbered(30))
    assert same(evaluate(images, fields={"workers": 2}), evaluate(images))


def test_crops_are_drawn_anew_and_repeatably() -> None:
    images = Lazy(numbered(10))
    first, second = take(images, 8), take(images, 8)
    places = torch.cat([batch.images[:, 0, -1, -1] for batch in first])
    assert same(first, second)
    assert len(places.unique()) > 10


def test_an_image_that_cannot_be_read_ends_in_its_own_words() -> None:
    with pytest.raises(UserError) as caught:
        take(Lazy(numbered(10), bad=4), 4, workers=1)
    assert str(caught.value) == "image 4 is bad"


@pytest.mark.slow
def test_a_loader_process_that_dies_ends_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^data\.workers: a loader process was killed[^\n]*$"):
        take(Lazy(numbered(10), deadly=4), 4, workers=1)


def test_too_little_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Tensor) -> Tensor:
        raise RuntimeError("unable to write to file: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"data\.workers: no room in shared memory for \d+ batches .*--shm-size"):
        take(Lazy(numbered(10)), 1, workers=1)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    take(Lazy(numbered(10)), 2, workers=1, flip=True)
    evaluate(numbered(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_files_read_by_processes_are_the_files(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{i}.png" for i in range(12)], size=40)
    fields: dict[str, Any] = {"path": tmp_path, "size": 32, "batch": 4}
    lazy, resident = (DataConfig(**fields, memory=memory, workers=1) for memory in (0, 99))
    batches = [
        list(islice(TrainingStream(open_images(c, "train"), c, seed=0, device=CPU).batches(0), 4))
        for c in (lazy, resident)
    ]
    assert same(*batches)


def test_a_bad_file_met_in_training_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{i}.png" for i in range(12)], size=40)
    (tmp_path / "5.png").write_bytes(file_bytes(smooth(40, 40))[:200])
    lazy = DataConfig(path=tmp_path, memory=0, workers=1, batch=4)
    images = open_images(lazy, "train")
    with pytest.raises(UserError, match=r"5\.png: damaged or truncated"):
        list(islice(TrainingStream(images, lazy, seed=0, device=CPU).batches(0), 4))


UNEXPECTED = """
    import torch
    from nvae.data.config import DataConfig
    from nvae.data.loading import TrainingStream
    from tests.data.test_loading import Lazy, config, numbered

    if __name__ == "__main__":
        batches = TrainingStream(Lazy(numbered(9)), config(workers=1), seed=0, device=torch.device("cpu")).batches(0)
        next(batches)
        raise ZeroDivisionError
"""


@pytest.mark.slow
def test_loader_processes_do_not_keep_a_failed_program_from_ending(tmp_path: Path) -> None:
    """The traceback keeps the loader alive, and processes that ignore signals would be waited for without end."""
    (tmp_path / "script.py").write_text(textwrap.dedent(UNEXPECTED))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.stderr.rstrip().endswith("ZeroDivisionError")


def test_images_in_memory_travel_to_other_processes() -> None:
    images = pickle.loads(pickle.dumps(numbered(3)))
    assert torch.equal(images.pixels, numbered(3).pixels)


def test_the_memory_that_is_shared_holds_all_that_is_under_way() -> None:
    """Slower readers than the consumer, and the reverse, never overwrite a batch in use."""
    batches = stream(Lazy(numbered(40)), workers=1).batches(0)
    for number, batch in zip(range(6 * fetching.PREFETCH), batches, strict=False):
        expected = [stream(numbered(40)).position(draw) for draw in batch.indices]
        assert (number, shown([batch])) == (number, expected)


@pytest.mark.gpu
def test_a_gpu_sees_the_same_batches() -> None:
    fields = {"flip": True, "binarize": True, "padding": 1}
    on_gpu = TrainingStream(numbered(10), config(**fields), seed=0, device=torch.device("cuda"))
    for here, there in zip(take(numbered(10), 5, **fields), on_gpu.batches(0), strict=False):
        assert torch.equal(here.images, there.images.cpu())


@pytest.mark.gpu
def test_a_gpu_is_fed_by_loader_processes() -> None:
    on_gpu = TrainingStream(Lazy(numbered(40)), config(workers=2, flip=True), seed=0, device=torch.device("cuda"))
    for here, there in zip(take(Lazy(numbered(40)), 20, flip=True), on_gpu.batches(0), strict=False):
        assert torch.equal(here.images, there.images.cpu())
