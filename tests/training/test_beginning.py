"""A new run begins once, with the images that its first update will see, on however many ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_ranks
from tiny_run import checkpoint, column, differences, log, tiny_run, train_in
from torch import Tensor

from nvae.checkpoints.format import save_checkpoint
from nvae.core import distributed
from nvae.core.errors import UserError
from nvae.models.base import FirstBatch, FirstImages
from nvae.models.nvae.model import NVAE
from nvae.models.registry import build
from nvae.training.beginning import training_noise

RES_ELU = ("model.architecture=res_elu", "model.scales=2")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[FirstBatch]:
    """The first batch of each call of `begin`, from now on."""
    seen: list[FirstBatch] = []
    original = NVAE.begin

    def begin(self: NVAE, first: FirstImages) -> None:
        seen.append(next(iter(first.batches)))
        original(self, first)

    monkeypatch.setattr(NVAE, "begin", begin)
    return seen


def cut(folder: Path, step: int) -> None:
    """Leaves a run as it was at a step."""
    for file in (folder / "tiny" / "checkpoints").iterdir():
        if file.name != f"step-{step:09d}.pt":
            file.unlink()


def rewrite(folder: Path, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what the checkpoint of a step holds."""
    content = checkpoint(folder / "tiny", step)
    change(content)
    del content["format"], content["version"]
    save_checkpoint(folder / "tiny" / "checkpoints" / f"step-{step:09d}.pt", content)


def test_several_draws_of_an_image_have_noise_of_their_own_in_any_batch() -> None:
    model = build(tiny_run("model.objective.importance_samples=3").model)
    whole, part = training_noise(model, [4, 5], seed=0), training_noise(model, [5], seed=0)
    for of_both, of_one in zip(whole, part, strict=True):
        draws = of_both.unflatten(0, (3, 2))[:, 1]
        assert torch.equal(draws, of_one) and len(draws.flatten(1).unique(dim=0)) == 3


# ------------------------------------------------------------------------------------------------------------- once


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_begins_once_wherever_it_is_continued(tmp_path: Path, begun: list[FirstBatch], step: int) -> None:
    assert train_in(tmp_path, tiny_run()) == "finished"
    cut(tmp_path, step)
    assert train_in(tmp_path, tiny_run()) == "finished"
    assert len(begun) == 1


def test_weights_of_another_run_need_no_beginning(tmp_path: Path, begun: list[FirstBatch]) -> None:
    assert train_in(tmp_path / "source", tiny_run()) == "finished"
    warm = tiny_run(f"train.init_from={tmp_path / 'source' / 'tiny'}")
    assert train_in(tmp_path, warm) == "finished"
    cut(tmp_path, 0)
    assert train_in(tmp_path, tiny_run()) == "finished", "nor where it is continued by another command"
    assert len(begun) == 1


@pytest.mark.parametrize(("step", "calls"), [(0, 2), (2, 1)])
def test_a_checkpoint_that_does_not_say_so_had_begun_after_its_first_update(
    tmp_path: Path, begun: list[FirstBatch], step: int, calls: int
) -> None:
    """Those of earlier versions."""
    assert train_in(tmp_path, tiny_run()) == "finished"
    cut(tmp_path, step)
    rewrite(tmp_path, step, lambda content: content["counters"].pop("begun"))
    assert train_in(tmp_path, tiny_run()) == "finished"
    assert len(begun) == calls


def test_a_run_that_had_not_begun_ends_as_one_that_begins_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions began in the first update."""
    assert train_in(tmp_path / "new", tiny_run(*RES_ELU)) == "finished"
    with monkeypatch.context() as patch:
        patch.setattr(NVAE, "begin", lambda self, first: None)
        assert train_in(tmp_path / "old", tiny_run(*RES_ELU)) == "finished"
    cut(tmp_path / "old", 0)
    rewrite(tmp_path / "old", 0, lambda content: content["counters"].pop("begun"))
    assert train_in(tmp_path / "old", tiny_run(*RES_ELU)) == "finished"
    assert log(tmp_path / "old" / "tiny") == log(tmp_path / "new" / "tiny")


# --------------------------------------------------------------------------------------------------- what is seen


def test_it_begins_with_the_images_and_the_noise_of_the_first_update(
    tmp_path: Path, begun: list[FirstBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[Tensor, list[Tensor]]] = []
    original = NVAE.forward

    def forward(self: NVAE, x: Tensor, noise: Any = None, labels: Any = None) -> Any:
        passes.append((x, noise))
        return original(self, x, noise, labels)

    monkeypatch.setattr(NVAE, "forward", forward)
    assert train_in(tmp_path, tiny_run("train.steps=1", "data.global_batch=64")) == "finished"
    (first,), (images, noise) = begun, passes[0]
    assert torch.equal(first.images, images)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.noise(), noise, strict=True))
    assert first.labels.shape == (len(images),) and set(first.labels.tolist()) <= set(range(10))


def test_the_images_can_be_read_again_and_know_their_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[FirstImages] = []
    monkeypatch.setattr(NVAE, "begin", lambda self, first: found.append(first))
    assert train_in(tmp_path, tiny_run("train.steps=1", "seed=3")) == "finished"
    (first,) = found
    assert (first.epoch_size, first.seed) == (1500, 3)
    once, again = (torch.cat(list(first.images(100))) for _ in range(2))
    assert torch.equal(once, again)


# ------------------------------------------------------------------------------------------------ what comes of it


def test_the_first_checkpoint_and_the_average_have_begun(tmp_path: Path) -> None:
    assert train_in(tmp_path, tiny_run(*RES_ELU)) == "finished"
    content = checkpoint(tmp_path / "tiny", 0)
    fresh = NVAE(tiny_run(*RES_ELU).model).state_dict()
    assert bool(content["model"]["started"])
    assert not torch.equal(
        content["model"]["preprocess.0.ops.0.convolution.bias"], fresh["preprocess.0.ops.0.convolution.bias"]
    )
    assert differences(content["ema"], content["model"]) == []


def test_a_beginning_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NVAE, "begin", lambda self, first: self.first_state.data.fill_(torch.nan))
    with pytest.raises(UserError, match="the weights that the run starts from are not finite"):
        train_in(tmp_path, tiny_run())
    assert not list((tmp_path / "tiny" / "checkpoints").glob("*.pt"))


# ------------------------------------------------------------------------------------------------------ several ranks


def train_on_both(folder: Path) -> None:
    """On each rank; notes the first images it is given."""
    original = NVAE.begin

    def begin(self: NVAE, first: FirstImages) -> None:
        torch.save(next(iter(first.batches)).images, folder / f"first-{distributed.rank()}.pt")
        original(self, first)
        with torch.no_grad():  # as two GPUs may differ
            self.head.weight[0, 0, 0, 0] += 1e-6 * distributed.rank()

    NVAE.begin = begin  # type: ignore[method-assign]
    assert train_in(folder, tiny_run(*RES_ELU, "data.batch=16", "data.global_batch=64")) == "finished"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    processes = start_ranks(2, train_on_both, folder)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.mark.slow
def test_every_rank_is_given_what_all_of_them_take_in_a_pass(two: Path) -> None:
    first, second = (torch.load(two / f"first-{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 32
    assert torch.equal(first, second)


@pytest.mark.slow
def test_two_processes_begin_and_train_as_one(two: Path, tmp_path: Path) -> None:
    """Also where their results differ in the last bit: the first rank's is that of both."""
    assert train_in(tmp_path, tiny_run(*RES_ELU, "data.batch=32", "data.global_batch=64")) == "finished"
    assert differences(checkpoint(two / "tiny", 0)["model"], checkpoint(tmp_path / "tiny", 0)["model"]) == []
    assert column(two / "tiny", "loss") == pytest.approx(column(tmp_path / "tiny", "loss"), rel=1e-5)
