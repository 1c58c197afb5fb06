"""Priors trained on the codes that a store keeps: the numbers that they have on codes made of each batch."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import start_ranks
from tiny_run import checkpoint, column, differences, log, train_in
from tiny_vqvae import GREY, first_config, prior_config

from nvae.commands.codes import write_codes
from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.preparation import prepare
from nvae.models.vqvae.network import Network
from nvae.training.config import AnyRunConfig
from nvae.training.trainer import Trainer

DIGITS = DataConfig(name="digits")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of stage 1 on grey digits."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("stored")
    assert train_in(runs, first_config(*GREY)) == "finished"
    return runs / "tiny"


@pytest.fixture(scope="module")
def store(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, with the codes of both mirror images of each."""
    store = tmp_path_factory.mktemp("stored") / "digits"
    prepare(DIGITS, store, processes=1, progress=False)
    list(write_codes(store, first, DIGITS.model_copy(update={"flip": True}), progress=False))
    return store


def on(store: Path, first: Path, *overrides: str) -> AnyRunConfig:
    return prior_config(first, *GREY, f"data.path={store}", *overrides)


@pytest.mark.parametrize("options", [[], ["data.flip=true"], ["model.train_decoder=true"], ["data.batch=8"]], ids=str)
def test_every_number_is_that_of_codes_made_on_the_way(
    first: Path, store: Path, tmp_path: Path, options: list[str]
) -> None:
    options = ["data.global_batch=32", *options]
    assert train_in(tmp_path / "made", on(store, first, *options)) == "finished"
    assert train_in(tmp_path / "kept", on(store, first, "data.stored_codes=true", *options)) == "finished"
    made, kept = tmp_path / "made" / "prior", tmp_path / "kept" / "prior"
    assert log(kept) == log(made)
    assert differences(checkpoint(kept)["model"], checkpoint(made)["model"]) == []


def test_nothing_is_encoded(first: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = on(store, first, "data.stored_codes=true", "train.steps=2", "train.validate_every=100")
    monkeypatch.setattr(Trainer, "_watch", lambda self: None)
    seen: list[int] = []
    original = Network.encode
    monkeypatch.setattr(Network, "encode", lambda self, x: seen.append(len(x)) or original(self, x))
    assert train_in(tmp_path, config) == "finished"
    assert sum(seen) == 64  # the unit of posterior_temperature


def test_a_run_that_stopped_goes_on_exactly(first: Path, store: Path, tmp_path: Path) -> None:
    config = on(store, first, "data.stored_codes=true", "data.flip=true")
    assert train_in(tmp_path / "whole", config) == "finished"
    assert train_in(tmp_path, config) == "finished"
    for step in (5, 6):
        (tmp_path / "prior" / "checkpoints" / f"step-{step:09d}.pt").unlink(missing_ok=True)
    assert train_in(tmp_path, config) == "finished"
    assert differences(checkpoint(tmp_path / "prior"), checkpoint(tmp_path / "whole" / "prior")) == []


def test_a_run_on_codes_of_its_own_goes_on_with_kept_ones(first: Path, store: Path, tmp_path: Path) -> None:
    whole, config = tmp_path / "whole", on(store, first)
    assert train_in(whole, config) == "finished"
    assert train_in(tmp_path, config) == "finished"
    for step in (5, 6):
        (tmp_path / "prior" / "checkpoints" / f"step-{step:09d}.pt").unlink(missing_ok=True)
    assert train_in(tmp_path, on(store, first, "data.stored_codes=true")) == "finished"
    found, expected = (checkpoint(runs / "prior")["model"] for runs in (tmp_path, whole))
    assert differences(found, expected) == []


def train_rank(runs: Path, store: Path, first: Path) -> None:
    train_in(runs, on(store, first, "data.stored_codes=true", "data.flip=true", "data.batch=16"))


@pytest.mark.slow
def test_two_processes_train_on_them_as_one(first: Path, store: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path / "one", on(store, first, "data.flip=true")) == "finished"
    processes = start_ranks(2, train_rank, tmp_path, store, first)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("loss", "kl"):
        assert column(tmp_path / "prior", name) == pytest.approx(column(tmp_path / "one" / "prior", name), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(runs: Path, config: AnyRunConfig) -> str:
    with pytest.raises(UserError) as error:
        train_in(runs, config)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_codes_of_another_first_stage_are_refused_by_name(first: Path, store: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config(*GREY, "seed=1", "train.steps=1")) == "finished"
    words = refused(tmp_path, on(store, tmp_path / "tiny", "data.stored_codes=true"))
    assert f"the store keeps the codes of {first} (" in words and "another first stage (" in words


def test_a_decoder_that_trained_on_is_no_other_first_stage(first: Path, store: Path, tmp_path: Path) -> None:
    top = on(store, first, "model.train_decoder=true", "model.level=0", "name=top", "train.steps=3")
    assert train_in(tmp_path, top) == "finished"
    below = on(store, tmp_path / "top", "model.level=1", "data.stored_codes=true", "train.steps=1")
    assert train_in(tmp_path, below) == "finished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.posterior_temperature=1"], r"model\.posterior_temperature: 1 draws other codes each time"),
        (["data.path=null"], r"data\.stored_codes: data\.path data/digits is no prepared store"),
    ],
)
def test_what_has_no_codes_that_could_be_kept_is_refused(
    first: Path, store: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_in(tmp_path, on(store, first, "data.stored_codes=true", *options))


def test_binarised_images_have_none() -> None:
    with pytest.raises(UserError, match=r"stored_codes: a binarised image has other codes at every draw"):
        prior_config(Path("x"), "data.stored_codes=true")


def test_a_model_of_images_takes_none(store: Path, tmp_path: Path) -> None:
    config = first_config(*GREY, f"data.path={store}", "data.stored_codes=true")
    assert "VQVAE trains on images, not on codes" in refused(tmp_path, config)


def test_a_store_without_codes_says_how_they_are_made(first: Path, tmp_path: Path) -> None:
    prepare(DIGITS, tmp_path / "digits", processes=1, progress=False)
    words = refused(tmp_path, on(tmp_path / "digits", first, "data.stored_codes=true"))
    assert "keeps no codes; scripts/prepare_data.py" in words


def test_flips_need_codes_of_mirror_images(first: Path, tmp_path: Path) -> None:
    prepare(DIGITS, tmp_path / "digits", processes=1, progress=False)
    list(write_codes(tmp_path / "digits", first, DIGITS, progress=False))
    words = refused(tmp_path, on(tmp_path / "digits", first, "data.stored_codes=true", "data.flip=true"))
    assert "keeps no codes of mirror images; make them with flip=true" in words


def test_a_damaged_code_is_named(first: Path, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(store, copy)
    shard = copy / "train-00000.codes.safetensors"
    content = bytearray(shard.read_bytes())
    content[-30] ^= 1
    shard.write_bytes(content)
    words = refused(tmp_path, on(copy, first, "data.stored_codes=true", "train.steps=60", "train.log_every=60"))
    assert "train-00000.codes.safetensors[" in words and "damaged" in words


def test_samples_that_a_family_does_not_take_are_refused_before_training(first: Path, tmp_path: Path) -> None:
    words = refused(tmp_path, prior_config(first, *GREY, "train.validation_samples=5"))
    assert "VQVAEPrior takes none, it has no density of its latents; found 5, allowed is 1" in words
    assert not (tmp_path / "prior" / "config.yaml").exists()
