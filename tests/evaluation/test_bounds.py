"""The bounds: against a closed form, against recorded vectors, and the same however the work is cut."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_gaussian import LinearGaussian, WithoutDensity, draw_images, linear_gaussian
from places import PARITY
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvae.checkpoints.format import save_checkpoint
from nvae.checkpoints.loading import load_model
from nvae.core.distributed import rank, world_size
from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.images import InMemory
from nvae.data.loading import Batch, evaluation_batches
from nvae.evaluation.bounds import Evaluator, Parts, bounds_of, evaluate, evaluate_batches, ladder
from nvae.evaluation.figures import Estimate, Evaluation, Figures
from nvae.models.config import ModelConfig
from nvae.models.nvae.model import NVAE

CASES = sorted(path.parent for path in PARITY.glob("*/checkpoint.pt"))


def batches_of(images: Tensor, size: int) -> Iterator[Batch]:
    for first in range(0, len(images), size):
        chosen = images[first : first + size]
        yield Batch(chosen, list(range(first, first + len(chosen))), torch.full((len(chosen),), -1))


def same(ours: Figures, other: Figures, tolerance: float = 1e-12) -> bool:
    first, second = ours.tensors(), other.tensors()
    return all(torch.allclose(first[name].double(), second[name].double(), tolerance, tolerance) for name in first)


@pytest.fixture(scope="module")
def toy() -> LinearGaussian:
    return linear_gaussian()


@pytest.fixture(scope="module")
def images(toy: LinearGaussian) -> Tensor:
    return draw_images(toy, 60)


@pytest.fixture(scope="module")
def measured(toy: LinearGaussian, images: Tensor) -> Figures:
    return evaluate_batches(toy, batches_of(images, 16), importance_samples=1000)


# ------------------------------------------------------------------------------------------------- the closed form


def standard_errors_between(ours: Tensor, exact: Tensor) -> float:
    """How many standard errors of the mean difference lie between two figures of the same images."""
    gap = ours - exact.detach()
    return float(gap.mean().abs() / (gap.std() / math.sqrt(len(gap))))


def test_the_bound_with_many_samples_is_the_exact_log_likelihood(
    toy: LinearGaussian, images: Tensor, measured: Figures
) -> None:
    exact = -toy.exact_log_prob(images)
    assert standard_errors_between(measured.bounds[1000], exact) < 3
    assert float((measured.bounds[1000] - exact).detach().abs().max()) < 0.2


def test_the_negative_elbo_is_the_closed_form(toy: LinearGaussian, images: Tensor, measured: Figures) -> None:
    assert standard_errors_between(measured.nelbo, -toy.exact_elbo(images)) < 3
    assert standard_errors_between(measured.bounds[1], -toy.exact_elbo(images)) < 3


def test_the_bound_tightens_with_the_number_of_samples(measured: Figures) -> None:
    means = [float(bound.mean()) for bound in measured.bounds.values()]
    assert list(measured.bounds) == [1, 10, 100, 1000]
    assert all(lower < upper for upper, lower in pairwise(means))
    assert means[0] - means[-1] > 0.2


def test_every_draw_counts_on_every_rung_that_divides_k() -> None:
    log_weights = torch.randn(20, 3, dtype=torch.float64)
    halves = [torch.logsumexp(half, 0) - math.log(10) for half in log_weights.chunk(2)]
    assert torch.allclose(bounds_of(log_weights)[10], -(halves[0] + halves[1]) / 2)
    assert torch.allclose(bounds_of(log_weights)[1], -log_weights.mean(0))


def test_a_rung_is_never_better_than_the_next_where_all_divide_k() -> None:
    log_weights = 3 * torch.randn(200, 50, dtype=torch.float64)
    rungs = list(bounds_of(log_weights).values())
    assert len(rungs) == 4
    for lower, higher in pairwise(rungs):
        assert bool((higher <= lower).all())


def test_draws_too_few_for_one_more_block_count_on_shorter_rungs_only() -> None:
    """K = 15: with poor draws first and good ones last, the rung of 10 misses the good ones, and is the worst."""
    log_weights = torch.cat([torch.full((10, 1), -50.0), torch.zeros(5, 1)]).double()
    found = {samples: float(bound) for samples, bound in bounds_of(log_weights).items()}
    assert found == pytest.approx({1: 50 * 10 / 15, 10: 50.0, 15: math.log(3)})


def test_the_ladder_ends_with_the_number_asked_for() -> None:
    assert [ladder(k) for k in (1, 7, 10, 250, 1000)] == [[1], [1, 7], [1, 10], [1, 10, 100, 250], [1, 10, 100, 1000]]


def test_active_units_are_the_channels_above_a_tenth_of_a_nat() -> None:
    channel_kl = torch.tensor([[0.9, 0.05, 0.0], [2.0, 0.41, 0.39]])  # summed over 4 images
    figures = Figures(torch.arange(4), torch.zeros(4), torch.zeros(4, 2), channel_kl, {})
    assert figures.active_units.tolist() == [1, 2]


# ----------------------------------------------------------------------------------------- however the work is cut


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (7, 20), (60, 10_000)])
def test_figures_do_not_depend_on_the_batch_nor_on_the_chunk(
    toy: LinearGaussian, images: Tensor, size: int, rows: int
) -> None:
    reference = evaluate_batches(toy, batches_of(images, 16), importance_samples=30, rows=64)
    assert same(evaluate_batches(toy, batches_of(images, size), importance_samples=30, rows=rows), reference)


def test_the_network_gives_the_same_figures_in_chunks(any_config: Any) -> None:
    model = NVAE(any_config).eval()
    images = torch.randint(0, 2, (5, any_config.image_channels, 8, 8)).float()
    whole = evaluate_batches(model, batches_of(images, 5), importance_samples=12, rows=60)
    assert same(evaluate_batches(model, batches_of(images, 2), importance_samples=12, rows=10), whole, 1e-4)


def test_another_seed_and_another_test_draw_have_other_noise(toy: LinearGaussian, images: Tensor) -> None:
    one = evaluate_batches(toy, batches_of(images, 60))
    assert not same(evaluate_batches(toy, batches_of(images, 60), seed=1), one)
    assert not same(evaluate_batches(toy, batches_of(images, 60), draw=1), one)


def test_an_image_is_encoded_once_whatever_the_number_of_samples(images: Tensor) -> None:
    toy = linear_gaussian()
    evaluate_batches(toy, batches_of(images, 15), importance_samples=50, rows=30)
    assert toy.encoded == 4


def test_one_draw_that_does_not_fit_asks_for_a_smaller_batch(images: Tensor) -> None:
    class Full(LinearGaussian):
        def decode(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="out of memory at one draw of 10 images: lower the batch"):
        Evaluator(linear_gaussian(Full), samples=30).measure(images[:10], range(10))


def test_large_images_are_decoded_few_at_a_time(tiny_config: Any) -> None:
    assert [Evaluator(NVAE(tiny_config(image_size=size))).rows for size in (8, 32, 64)] == [512, 32, 8]


def test_a_chunk_that_does_not_fit_in_memory_is_halved(images: Tensor) -> None:
    class Small(LinearGaussian):
        def decode(self, features: Any, *args: Any, **kwargs: Any) -> Any:
            if len(features.images) > 40:
                raise torch.OutOfMemoryError
            return super().decode(features, *args, **kwargs)

    evaluator = Evaluator(linear_gaussian(Small), samples=30, rows=300)
    figures = evaluator.measure(images[:10], range(10))
    assert evaluator.rows == 30
    assert same(figures, Evaluator(linear_gaussian(), samples=30).measure(images[:10], range(10)))


# ------------------------------------------------------------------------------------------------------- going on


class StoppedError(Exception):
    pass


def stopping(batches: Iterator[Batch], after: int) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        if number == after:
            raise StoppedError
        yield batch


def test_a_stopped_evaluation_goes_on_where_it_was(toy: LinearGaussian, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        evaluate_batches(toy, stopping(batches_of(images, 7), 3), parts=Parts(tmp_path, seconds=0))
    parts = Parts(tmp_path, seconds=0)
    assert parts.done == set(range(21))
    before = toy.encoded
    resumed = evaluate_batches(toy, batches_of(images, 15), parts=parts)
    assert toy.encoded - before == 3  # the first batch of 15 is done
    assert same(resumed, evaluate_batches(toy, batches_of(images, 15)))


def test_a_finished_evaluation_measures_nothing_again(toy: LinearGaussian, images: Tensor, tmp_path: Path) -> None:
    first = evaluate_batches(toy, batches_of(images, 20), parts=Parts(tmp_path))
    before = toy.encoded
    assert same(evaluate_batches(toy, batches_of(images, 20), parts=Parts(tmp_path)), first)
    assert toy.encoded == before


# ------------------------------------------------------------------------------------------- what is written down


def test_standard_errors_are_over_images_and_over_test_draws() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])  # (2 draws, 3 images)
    estimate = Estimate.of(values)
    assert estimate.nats == 4
    assert estimate.standard_error == pytest.approx(torch.tensor([2.0, 3.0, 7.0]).std().item() / math.sqrt(3))
    assert estimate.draws_standard_error == pytest.approx(torch.tensor([3.0, 5.0]).std().item() / math.sqrt(2))


def test_several_test_draws_are_averaged(toy: LinearGaussian, images: Tensor) -> None:
    whole = evaluate(toy, lambda draw: batches_of(images + draw / 100, 20), draws=2)
    single = [
        evaluate_batches(toy, batches_of(images + draw / 100, 20), draw=draw).summary()["nelbo"] for draw in (0, 1)
    ]
    assert whole.estimates()["nelbo"].nats == pytest.approx(sum(single) / 2)


def test_bits_per_dim_count_the_image_without_its_border(tiny_config: Any) -> None:
    config = tiny_config(image_channels=1, likelihood={"kind": "bernoulli", "border": 1})
    figures = Figures(torch.arange(2), torch.full((2,), 36 * math.log(2)), torch.zeros(2, 1), torch.zeros(1, 1), {})
    entry = Evaluation([figures]).entry(config)
    assert entry["dims"] == 36
    assert entry["estimates"]["nelbo"]["bits_per_dim"] == pytest.approx(1)
    json.dumps(entry)


def test_a_family_without_density_evaluates_what_it_can(images: Tensor) -> None:
    model = linear_gaussian(WithoutDensity)
    figures = evaluate_batches(model, batches_of(images, 20))
    assert figures.bounds == {} and set(figures.summary()) == {"nelbo", "reconstruction", "kl"}
    with pytest.raises(UserError, match="WithoutDensity takes none, it has no density of its latents; found 10"):
        evaluate_batches(model, batches_of(images, 20), importance_samples=10)


def test_a_non_finite_bound_names_its_image(images: Tensor) -> None:
    class Spoilt(LinearGaussian):
        def decode(self, features: Any, *args: Any, **kwargs: Any) -> Any:
            output = super().decode(features, *args, **kwargs)
            is_bad = (features.images == images[33]).flatten(1).all(1)
            output.log_p = torch.where(is_bad, math.nan, output.log_p)
            return output

    with pytest.raises(UserError, match="1 of 60 images have a non-finite bound, the first at position 33"):
        evaluate(linear_gaussian(Spoilt), lambda draw: batches_of(images, 20))


# ---------------------------------------------------------------------------------------- published checkpoints


class Replayed(Evaluator):
    """Uses recorded noise."""

    recorded: list[Tensor]

    def _noise(self, indices: Any, samples: range) -> list[Tensor]:
        return self.recorded


@pytest.mark.filterwarnings("ignore:published checkpoint")
@pytest.mark.parametrize("folder", CASES, ids=[path.name for path in CASES])
def test_a_converted_published_checkpoint_evaluates_to_the_recorded_figures(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    published = load_model(folder / "checkpoint.pt")
    config = {"model": published.config.model_dump(mode="json")}
    save_checkpoint(tmp_path / "ours.pt", {"config": config, "model": published.state_dict()})
    evaluator = Replayed(load_model(tmp_path / "ours.pt"))
    evaluator.recorded = [expected[f"noise.{g}"] for g in range(sum(name.startswith("noise.") for name in expected))]
    figures = evaluator.measure(expected["image"] / 255, [0, 1])
    for ours, reference in (
        (figures.reconstruction, expected["eval.reconstruction_nll"]),
        (figures.kl, expected["eval.kl_per_group"]),
        (figures.bounds[1], -expected["eval.log_importance_weight"]),
    ):
        assert float((ours - reference).abs().max() / reference.abs().max()) < 1e-5


def test_model_config_is_all_that_the_entry_needs(toy: LinearGaussian, measured: Figures) -> None:
    assert isinstance(toy.config, ModelConfig)
    entry = Evaluation([measured]).entry(toy.config)
    assert len(entry["kl_per_group"]) == 1 and entry["active_units_per_group"] == [3]


# ------------------------------------------------------------------------------------------------------ many ranks


def evaluate_on_this_rank(path: Path) -> None:
    """7 images, which neither 2 nor 3 divides, a piece at a time."""
    toy = linear_gaussian()
    shown = InMemory((draw_images(toy, 7).clamp(-1, 1) * 127 + 128).byte())
    settings = {"batch": 2, "device": torch.device("cpu"), "seed": 0, "rank": rank(), "world": world_size()}
    batches = evaluation_batches(shown, DataConfig(size=4), **settings)
    figures = evaluate_batches(toy, batches, importance_samples=10, parts=Parts(path / "parts", seconds=0))
    save_file(figures.tensors(), path / f"rank-{rank()}-of-{world_size()}.safetensors")


def test_one_two_and_three_ranks_give_the_same_figures(tmp_path: Path) -> None:
    found = []
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        evaluate_on_this_rank(folder) if world == 1 else run_ranks(world, evaluate_on_this_rank, folder)
        assert Parts(folder / "parts").done == set(range(7))
        found += [Figures.from_tensors(load_file(file)) for file in sorted(folder.glob("rank-*"))]
    assert len(found) == 6
    assert all(figures.indices.tolist() == list(range(7)) for figures in found)
    assert all(same(figures, found[0]) for figures in found)
