"""One update and the loop around it: what is skipped, undone, returned to, watched and saved."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import EVERY_BRICK, checkpoint, column, differences, log, outcome, tiny_run, train_in
from torch import Tensor
from torch._dynamo.utils import counters

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.data.loading import Batch, TrainingStream, evaluation_batches
from nvae.data.sets import open_images
from nvae.evaluation.bounds import evaluate_batches
from nvae.models.base import Output
from nvae.training import setup
from nvae.training.adamax import Adamax
from nvae.training.optim import Schedule
from nvae.training.trainer import Trainer
from nvae.training.watching import numbers_of

Alter = Callable[[Callable[[Any], Any]], None]


def trained(folder: Path, *overrides: str) -> Path:
    """Trains to the end; the run's folder."""
    assert train_in(folder, tiny_run(*overrides)) == "finished"
    return folder / "tiny"


@pytest.fixture
def alter(monkeypatch: pytest.MonkeyPatch) -> Alter:
    """Lets a function change the model before it is trained."""

    def patch(change: Callable[[Any], Any]) -> None:
        original = setup.build

        def build(config: Any) -> Any:
            model = original(config)
            change(model)
            return model

        monkeypatch.setattr(setup, "build", build)

    return patch


def changing_loss(steps: int, change: Callable[[int, Tensor], Tensor]) -> Callable[[Any], None]:
    """An alteration: the loss of each update of a run of so many is changed by a function of (update, loss)."""

    def alteration(model: Any) -> None:
        original = model.loss

        def loss(output: Output, progress: float) -> Any:
            value, metrics = original(output, progress)
            return change(round(progress * steps), value), metrics

        model.loss = loss

    return alteration


def nan_in_loss(loss: Tensor) -> Tensor:
    return loss * torch.nan


def nan_in_gradient(loss: Tensor) -> Tensor:
    loss = loss.clone()
    loss.register_hook(lambda gradient: gradient * torch.nan)
    return loss


# ----------------------------------------------------------------------------------------------------- a golden run


GOLDEN_LOSSES = [43.9765, 54.4476, 51.8625, 45.9660, 43.9995, 44.3482]
GOLDEN_NELBO = 48.8715
"""Recorded from `EVERY_BRICK`: data, noise, schedule, optimiser and averaging together."""


def test_a_short_run_does_not_move(tmp_path: Path) -> None:
    folder = trained(tmp_path, *EVERY_BRICK)
    assert column(folder, "loss") == pytest.approx(GOLDEN_LOSSES, rel=1e-4)
    assert column(folder, "validation_ema/nelbo") == pytest.approx([GOLDEN_NELBO], rel=1e-4)


# ----------------------------------------------------------------------------------- when numbers stop being finite


@pytest.fixture(params=["loss", "gradient", "batch"])
def poison(
    request: pytest.FixtureRequest, alter: Alter, monkeypatch: pytest.MonkeyPatch
) -> Callable[[set[int], int], None]:
    """Puts nan into the loss, the gradients or the images of some updates of a run of so many."""

    def patch(bad: set[int], steps: int) -> None:
        if request.param != "batch":
            change = nan_in_loss if request.param == "loss" else nan_in_gradient
            alter(changing_loss(steps, lambda step, loss: change(loss) if step in bad else loss))
            return
        original = TrainingStream.batches

        def batches(self: TrainingStream, start: int) -> Iterator[Batch]:
            for batch in original(self, start):
                step = batch.indices[0] // self.config.batch
                yield replace(batch, images=batch.images * torch.nan) if step in bad else batch

        monkeypatch.setattr(TrainingStream, "batches", batches)

    return patch


def test_a_non_finite_update_is_not_made_and_leaves_no_trace(
    tmp_path: Path, poison: Callable[[set[int], int], None]
) -> None:
    poison({1, 3}, 4)
    folder = trained(tmp_path, "train.steps=4", "train.save_every=3")
    before, after = checkpoint(folder, 3), checkpoint(folder, 4)
    assert [differences(before[part], after[part]) for part in ("model", "ema", "optimiser")] == [[], [], []]
    assert (after["counters"]["non_finite"], after["counters"]["step"]) == (2, 4)
    assert column(folder, "non_finite") == [0, 1, 1, 2]
    assert int(after["model"]["preprocess.0.ops.0.norm.num_batches_tracked"]) == 2


def test_a_run_that_stays_non_finite_goes_back_at_half_the_learning_rate(tmp_path: Path, alter: Alter) -> None:
    failures = iter(range(3))  # the first three tries of updates from 5 on
    bad = lambda step: step >= 5 and next(failures, None) is not None  # noqa: E731
    alter(changing_loss(8, lambda step, loss: nan_in_loss(loss) if bad(step) else loss))
    folder = trained(tmp_path, "train.steps=8", "train.non_finite_limit=3", "train.save_every=4")
    counters = checkpoint(folder)["counters"]
    assert (counters["returns"], counters["lr_factor"], counters["non_finite"]) == (1, 0.5, 3)
    assert [line for line in log(folder) if "returns" in line] == [
        {"step": 4, "returned_from": 8, "returns": 1, "lr_factor": 0.5}
    ]
    assert [line["step"] for line in log(folder) if "loss" in line] == list(range(1, 9))
    schedule = Schedule(tiny_run().optim, 8, 1500 / 32, 32)
    rates = [schedule(step) for step in range(4)] + [schedule(step) / 2 for step in range(4, 8)]
    assert column(folder, "learning_rate") == pytest.approx(rates)


def test_after_the_last_return_it_stops_and_names_the_first_module(tmp_path: Path, alter: Alter) -> None:
    alter(lambda model: model.groups[1].prior.register_forward_hook(lambda module, inputs, output: output / 0))
    with pytest.raises(UserError) as error:
        train_in(tmp_path, tiny_run("train.non_finite_limit=2", "train.return_limit=2"))
    said = str(error.value)
    assert "after 2 returns" in said
    assert "first to be non-finite: the output of 'groups.1.prior'" in said
    assert "optim.lr" in said
    assert outcome(tmp_path / "tiny") == {"outcome": "failed", "step": 0, "message": f"rank 0: {said}"}
    assert [file.name for file in sorted((tmp_path / "tiny" / "checkpoints").glob("*.pt"))] == ["step-000000000.pt"]


def test_a_gradient_that_is_not_finite_is_traced_to_its_module(tmp_path: Path, alter: Alter) -> None:
    def poison_gradient(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    alter(lambda model: model.groups[1].combine.register_forward_hook(poison_gradient))
    with pytest.raises(UserError, match=r"first to be non-finite: the gradient at 'groups\.1\.combine'"):
        train_in(tmp_path, tiny_run("train.non_finite_limit=1", "train.return_limit=0"))


def test_checkpoints_are_not_written_amid_non_finite_updates(tmp_path: Path, alter: Alter) -> None:
    alter(changing_loss(8, lambda step, loss: nan_in_loss(loss) if step in (3, 4, 5) else loss))
    folder = trained(tmp_path, "train.steps=8", "train.save_every=1")
    saved = [int(file.stem[5:]) for file in sorted((folder / "checkpoints").glob("step-*.pt"))]
    assert saved == [0, 1, 2, 3, 7, 8]


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, updates = Adamax.step, iter(range(100))

    def step(self: torch.optim.Optimizer, *args: Any) -> Any:
        result = original(self, *args)
        if next(updates) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][5][0] = torch.inf
        return result

    monkeypatch.setattr(Adamax, "step", step)
    folder = trained(tmp_path)
    for file in (folder / "checkpoints").glob("*.pt"):
        content = torch.load(file, weights_only=True)
        assert all(bool(tensor.isfinite().all()) for tensor in [*content["model"].values(), *content["ema"].values()])
    assert checkpoint(folder)["counters"]["returns"] == 1


def test_the_spectral_penalty_survives_a_first_update_that_is_not_made(tmp_path: Path, alter: Alter) -> None:
    plain = trained(tmp_path / "plain", "optim.warmup_steps=6")
    alter(changing_loss(6, lambda step, loss: nan_in_loss(loss) if step == 0 else loss))
    folder = trained(tmp_path, "optim.warmup_steps=6")
    # The learning rate of the first update is 0, so the weights of the second are the same.
    assert column(folder, "spectral")[1] == pytest.approx(column(plain, "spectral")[1], rel=1e-2)


# ------------------------------------------------------------------------------------------ clipping, skipping, scale


def test_an_update_with_a_large_gradient_is_skipped_until_the_limit(tmp_path: Path) -> None:
    folder = trained(tmp_path, "optim.skip_norm=1e-6", "optim.skip_limit=2", "train.save_every=1")
    assert column(folder, "skipped") == [1, 2, 2, 3, 4, 4]
    weights = [checkpoint(folder, step)["model"]["stem.weight"] for step in range(7)]
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [False, False, True, False, False, True]


def test_gradients_are_clipped_to_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = Trainer._update

    def update(self: Trainer, norm: Tensor) -> Any:
        metrics = original(self, norm)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])))
        return metrics

    monkeypatch.setattr(Trainer, "_update", update)
    folder = trained(tmp_path, "optim.clip_norm=20")
    logged = column(folder, "gradient_norm")
    assert max(logged) > 20
    assert norms == pytest.approx([min(norm, 20) for norm in logged], rel=1e-4)


# ------------------------------------------------------------------------------------------- batches and precision


def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    """In a family without statistics over the batch."""
    layers = "encoder: '8x1,8d2,4x1,4d4,1x1', decoder: '1x1,4m1,4x1,8m4', width: 8, input_mean: 128, input_std: 64"
    vdvae = "model={family: vdvae, image_size: 8, image_channels: 1, likelihood: {kind: bernoulli}, " + layers + "}"
    options = [vdvae, "optim.name=adamw", "optim.eps=1e-8", "train.steps=4", "data.global_batch=64"]
    whole = trained(tmp_path / "whole", *options, "data.batch=64")
    parts = trained(tmp_path / "parts", *options, "data.batch=16")
    for name in ("loss", "gradient_norm", "kl_group/02"):
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-5)


def test_bfloat16_trains_on_the_cpu(tmp_path: Path) -> None:
    options = ["train.precision=bf16", "train.steps=20", "optim.lr=3e-3"]
    folder = trained(tmp_path, *options)
    nelbo = column(folder, "nelbo")
    assert nelbo[-1] < 0.9 * nelbo[0]
    assert {tensor.dtype for tensor in checkpoint(folder)["model"].values()} <= {torch.float32, torch.int64, torch.bool}


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.precision: fp16 needs a CUDA device"):
        train_in(tmp_path, tiny_run("train.precision=fp16"))


@pytest.mark.parametrize(("mode", "tolerance"), [("cells", 0.0), ("activations", 1e-6)])
def test_recomputation_changes_neither_weights_nor_statistics(tmp_path: Path, mode: str, tolerance: float) -> None:
    options = ["train.steps=3", "data.global_batch=64"]
    plain = checkpoint(trained(tmp_path / "plain", *options))["model"]
    found = checkpoint(trained(tmp_path / mode, *options, f"train.recompute={mode}"))["model"]
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    assert int(found["preprocess.0.ops.0.norm.num_batches_tracked"]) == 2 * 3


@pytest.mark.full
def test_a_compiled_model_trains_the_same_and_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(tmp_path / "plain")
    graphs: list[int] = []
    original = Trainer.step

    def step(self: Trainer) -> Any:
        metrics = original(self)
        graphs.append(counters["stats"]["unique_graphs"])
        return metrics

    monkeypatch.setattr(Trainer, "step", step)
    compiled = trained(tmp_path / "compiled", "train.compile=true")
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    assert graphs[0] > 0
    assert len(set(graphs[2:])) == 1


# -------------------------------------------------------------------------------------------------------- watching


def test_every_number_is_logged(tmp_path: Path) -> None:
    folder = trained(tmp_path, "train.log_every=3")
    line, last = log(folder)[0], log(folder)[-1]
    groups = [f"{place:02d}" for place in range(2)]
    assert set(line) == {
        *("step", "epoch", "loss", "nelbo", "reconstruction", "kl", "kl_coefficient"),
        *(f"{name}/{group}" for name in ("kl_group", "active_units", "kl_group_coefficient") for group in groups),
        *("spectral", "batch_norm_scales", "spectral_weight", "learning_rate", "gradient_norm"),
        *("skipped", "non_finite", "loss_scale"),
    }
    names = ("nelbo", "reconstruction", "kl", "bound_1", "bound")
    assert set(last) == {"step", *(f"{which}/{name}" for which in ("validation", "validation_ema") for name in names)}


def test_active_units_are_channels_of_more_than_a_tenth_of_a_nat() -> None:
    channel_kl = torch.tensor([[0.09, 0.2], [0.11, 0.5], [0.0, 0.1]])
    numbers = numbers_of({"channel_kl": channel_kl}, tiny_run().model, torch.device("cpu"))
    assert numbers == {"active_units/00": 1, "active_units/01": 2, "active_units/02": 0}


def test_the_board_has_numbers_pictures_config_and_result(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"loss", "images_per_second", "peak_memory_mib", "kl_group/01", "final/bound"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"reconstructions", *(f"samples/{t}" for t in (0.7, 0.8, 0.9, 1.0))}
    assert "config/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_the_logged_bound_is_the_true_one(tmp_path: Path) -> None:
    """Warm-up weights and penalties are in the loss alone."""
    (line, *_) = log(trained(tmp_path))
    assert line["kl_coefficient"] < 1
    assert line["nelbo"] == pytest.approx(line["reconstruction"] + line["kl"], rel=1e-6)
    assert line["kl"] == pytest.approx(sum(line[f"kl_group/{g:02d}"] for g in range(2)), rel=1e-5)
    weighted = sum(line[f"kl_group_coefficient/{g:02d}"] * line[f"kl_group/{g:02d}"] for g in range(2))
    penalties = line["spectral_weight"] * (line["spectral"] + line["batch_norm_scales"])
    assert line["loss"] == pytest.approx(line["reconstruction"] + weighted + penalties, rel=1e-5)


@pytest.mark.parametrize(("weights", "prefix"), [("raw", "validation"), ("ema", "validation_ema")])
def test_validation_measures_both_the_weights_and_their_average(tmp_path: Path, weights: Any, prefix: str) -> None:
    folder = trained(tmp_path, "train.validation_samples=3")
    data = tiny_run().data
    batches = evaluation_batches(open_images(data, "validation"), data, batch=50, device=torch.device("cpu"), seed=0)
    found = evaluate_batches(load_model(folder, weights=weights), batches, importance_samples=3, seed=0).summary()
    assert column(folder, f"{prefix}/nelbo") == pytest.approx([found["nelbo"]], rel=1e-5)
    assert column(folder, f"{prefix}/bound") == pytest.approx([found["bound_3"]], rel=1e-5)


def test_bits_per_dim_are_shown_where_they_are_the_usual_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["model.likelihood={kind: logistic_mixture, components: 2}", "data.binarize=false"]
    folder = trained(tmp_path, *options, "train.steps=1")
    assert "bits_per_dim" in capsys.readouterr().out
    (line, *_) = log(folder)
    assert line["bits_per_dim"] == pytest.approx(line["nelbo"] / 64 / 0.6931471805599453)


def test_the_best_checkpoint_is_that_of_the_lowest_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr("nvae.training.watching.Watcher.bounds", lambda self, model: {"bound": next(bounds)})
    folder = trained(tmp_path, "optim.ema=null", f"train.validate_every={2 * 32 / 1500}")
    assert [line["step"] for line in log(folder) if "validation/bound" in line] == [2, 4, 6]
    assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["counters"]["step"] == 4
    assert checkpoint(folder)["counters"]["best"] == 3.0


def test_milestones_are_saved_whenever_they_come(tmp_path: Path) -> None:
    folder = trained(tmp_path, "train.keep=1", "train.save_every=4", "train.milestone_every=3")
    saved = [int(file.stem[5:]) for file in sorted((folder / "checkpoints").glob("step-*.pt"))]
    assert saved == [3, 6]


def test_logging_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"step": 0.0, "_log": 0.0}

    def timed(name: str) -> Callable[..., Any]:
        original = getattr(Trainer, name)

        def method(self: Trainer, *args: Any) -> Any:
            began = time.thread_time()
            result = original(self, *args)
            spent[name] += time.thread_time() - began
            return result

        return method

    for name in spent:
        monkeypatch.setattr(Trainer, name, timed(name))
    trained(tmp_path, "train.steps=50", "train.log_every=50", "train.save_every=50")
    assert spent["_log"] < 0.02 * spent["step"]


# ---------------------------------------------------------------------------------------------------- out of memory


def test_out_of_memory_says_what_to_change(tmp_path: Path, alter: Alter) -> None:
    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    alter(lambda model: model.stem.register_forward_hook(exhausted))
    said = r"train\.recompute=cells or train\.precision=mixed or data\.batch=16 data\.global_batch=32 would need less"
    with pytest.raises(UserError, match=said) as error:
        train_in(tmp_path, tiny_run())
    assert outcome(tmp_path / "tiny")["message"] == f"rank 0: {error.value}"


# -------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "mixed"])
def test_every_precision_trains_on_a_gpu(tmp_path: Path, precision: str) -> None:
    folder = trained(tmp_path, "train.device=cuda", f"train.precision={precision}", "train.steps=20", *EVERY_BRICK)
    nelbo = column(folder, "nelbo")
    assert nelbo[-1] < 0.9 * nelbo[0]
    assert checkpoint(folder)["model"]["stem.weight"].dtype == torch.float32


@pytest.mark.gpu
def test_a_loss_scale_that_is_too_high_comes_down(tmp_path: Path) -> None:
    options = ["train.precision=fp16", "train.device=cuda", f"train.loss_scale={2.0**24}", "train.steps=20"]
    folder = trained(tmp_path, *options, "train.non_finite_limit=20")
    scales, non_finite = column(folder, "loss_scale"), column(folder, "non_finite")
    assert 0 < non_finite[-1] < 20
    assert scales[-1] == 2.0**24 / 2 ** non_finite[-1]


@pytest.mark.gpu
def test_the_gpu_has_the_losses_of_the_cpu(tmp_path: Path) -> None:
    """Up to the noise, which devices draw differently: the bound of the averaged weights is close."""
    options = [*EVERY_BRICK, "train.steps=20"]
    cpu = column(trained(tmp_path / "cpu", *options), "validation_ema/bound")
    gpu = column(trained(tmp_path / "gpu", *options, "train.device=cuda"), "validation_ema/bound")
    assert gpu == pytest.approx(cpu, rel=2e-2)
