"""Runs of models with classes on the digits: resumed, in two processes, and refused where classes do not fit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start_ranks
from tiny_run import checkpoint, column, differences, log, tiny_run, train_in

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.training.config import AnyRunConfig
from nvae.training.trainer import Trainer

VERY_DEEP = {
    "family": "vdvae",
    "width": 8,
    "latent_channels": 3,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x1,4m1,8m4",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "nvae": {"classes": 10},
    "vdvae": {"image_size": 8, "image_channels": 1, "likelihood": {"kind": "bernoulli"}, "classes": 10, **VERY_DEEP},
}
VECTORS = {"nvae": ["class_prior.weight", "class_state.weight"], "vdvae": ["class_state.weight"]}


def config(family: str, *overrides: str) -> AnyRunConfig:
    fields = [f"model.{name}={value}" for name, value in FAMILIES["nvae"].items()]
    if family == "vdvae":
        fields = [f"model={FAMILIES['vdvae']}"]
    return tiny_run(*fields, *overrides)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp(family)
    assert train_in(runs, config(family)) == "finished"
    return runs / "tiny"


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the fifth update die in its middle, once."""
    original, left = Trainer._accumulate_gradients, [5]

    def gradients(self: Trainer) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise ConnectionAbortedError
        return original(self)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", gradients)
    yield


def test_a_run_learns_a_vector_for_every_class(family: str, reference: Path) -> None:
    state = checkpoint(reference)["model"]
    for name in VECTORS[family]:
        assert state[name].shape[0] == 10
        assert bool(state[name].abs().sum(1).gt(0).all())
    assert load_model(reference).config.classes == 10


@pytest.mark.usefixtures("dying")
def test_a_run_that_died_ends_as_if_it_had_not(family: str, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        train_in(tmp_path, config(family))
    assert train_in(tmp_path, config(family)) == "finished"
    assert differences(checkpoint(tmp_path / "tiny"), checkpoint(reference)) == []
    assert log(tmp_path / "tiny") == log(reference)


def _train_rank(runs: Path, family: str) -> None:
    train_in(runs, config(family, "data.batch=16"))


@pytest.mark.slow
def test_two_processes_train_as_one(family: str, reference: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, _train_rank, tmp_path, family)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("loss", "nelbo", "gradient_norm"):
        assert column(tmp_path / "tiny", name) == pytest.approx(column(reference, name), rel=1e-4), name
    ours, theirs = checkpoint(tmp_path / "tiny")["model"], checkpoint(reference)["model"]
    for name in VECTORS[family]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_images_of_more_classes_than_the_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.classes: is 9, but the images have classes up to 9"):
        train_in(tmp_path, config("nvae", "model.classes=9"))


def test_images_without_classes_are_refused(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    data = f"data={{name: images, path: {tmp_path / 'images.npz'}, size: 8, channels: 1, batch: 8, binarize: true}}"
    with pytest.raises(UserError, match=r"model\.classes: is 10, but no training image has a class"):
        train_in(tmp_path, config("nvae", data))
