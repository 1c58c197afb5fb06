"""Spectral norms against the exact SVD, batch-norm scales against their definition."""

import copy

import pytest
import torch
from counting import Operators
from torch import Tensor

from nvae.bricks.regularizers import SpectralPenalty, batch_norm_penalty

SHAPES = {"a": (3, 8, 20), "b": (2, 16, 9), "c": (4, 1, 25), "d": (1, 30, 5)}  # (N, O, R)


def matrices() -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in SHAPES.items()}


def penalty() -> SpectralPenalty:
    return SpectralPenalty({key: (n, o) for key, (n, o, _) in SHAPES.items()})


def exact(batches: dict[str, Tensor]) -> float:
    return sum(float(torch.linalg.svdvals(batch.double())[:, 0].sum()) for batch in batches.values())


def vectors(module: SpectralPenalty) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def test_the_first_sum_is_within_one_percent_of_the_exact_one() -> None:
    given = matrices()
    assert float(penalty()(given)) == pytest.approx(exact(given), rel=0.01)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_weights_that_have_all_but_vanished_or_grown_huge_are_measured_as_well(scale: float) -> None:
    given, module = matrices(), penalty()
    scaled = {key: matrix * scale for key, matrix in given.items()}
    assert float(module(scaled)) == pytest.approx(exact(scaled), rel=0.01)


def test_more_steps_come_closer_from_below() -> None:
    given, module = matrices(), penalty()
    sums = [float(module(given)) for _ in range(60)]
    assert sums[0] <= sums[-1] <= exact(given) * (1 + 1e-5)
    assert sums[-1] == pytest.approx(exact(given), rel=1e-4)


def test_the_gradient_is_the_product_of_the_singular_vectors() -> None:
    given = {key: matrix.double().requires_grad_() for key, matrix in matrices().items()}
    module = penalty().double()
    for _ in range(100):
        total = module(given)
    gradients = torch.autograd.grad(total, list(given.values()))
    for matrix, gradient in zip(given.values(), gradients, strict=True):
        left, _, right = torch.linalg.svd(matrix.detach())
        expected = left[:, :, :1] @ right[:, :1]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_the_value_is_the_gradient_times_the_matrix() -> None:
    """Also before the vectors have converged, so that value and gradient belong together."""
    given = {key: matrix.requires_grad_() for key, matrix in matrices().items()}
    total = penalty()(given)
    gradients = torch.autograd.grad(total, list(given.values()))
    products = sum((gradient * matrix).sum() for gradient, matrix in zip(gradients, given.values(), strict=True))
    torch.testing.assert_close(total, products)


def test_the_first_step_iterates_forty_times_and_later_ones_four(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def count(matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        counts.append(iterations)
        return torch.ones_like(u), torch.ones(matrix.shape[0], matrix.shape[2])

    monkeypatch.setattr("nvae.bricks.regularizers._iterate", count)
    module = penalty()
    for _ in range(3):
        module(matrices())
    assert counts == [40] * 4 + [4] * 8


def test_vectors_are_kept_between_steps() -> None:
    """From the kept vectors four iterations follow a slowly changing matrix; from random ones they do not."""
    given, module = matrices(), penalty()
    module(given)
    moved = {key: matrix + 0.01 * torch.randn_like(matrix) for key, matrix in given.items()}
    assert float(module(moved)) == pytest.approx(exact(moved), rel=0.01)


def test_vectors_travel_with_the_state() -> None:
    given, module = matrices(), penalty()
    module(given)
    loaded = penalty()
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(given), module(given))
    for ours, theirs in zip(loaded.buffers(), module.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_without_vectors_starts_anew() -> None:
    given, module = matrices(), penalty()
    module(given)
    module.load_state_dict(penalty().state_dict())
    assert torch.equal(module(given), penalty()(given))


def test_two_fresh_penalties_agree() -> None:
    given = matrices()
    torch.manual_seed(1)
    first = penalty()(given)
    torch.manual_seed(2)
    assert torch.equal(penalty()(given), first)


def test_the_vectors_are_unit_vectors() -> None:
    module = penalty()
    module(matrices())
    for buffer in module.buffers():
        torch.testing.assert_close(buffer.norm(dim=1), torch.ones(len(buffer)))


def test_a_later_step_leaves_the_graph_of_an_earlier_one_alone() -> None:
    given = {key: matrix.requires_grad_() for key, matrix in matrices().items()}
    module = penalty()
    first = module(given)
    expected = torch.autograd.grad(first, list(given.values()), retain_graph=True)
    module({key: torch.randn_like(matrix) for key, matrix in given.items()})
    for ours, theirs in zip(torch.autograd.grad(first, list(given.values())), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_sum_is_float32_whatever_the_autocast() -> None:
    given = {key: matrix.requires_grad_() for key, matrix in matrices().items()}
    module = penalty()
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(given)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, twin(given))


def test_a_zero_matrix_has_norm_and_gradient_zero() -> None:
    matrix = torch.zeros(2, 4, 6, requires_grad=True)
    total = SpectralPenalty({"z": (2, 4)})({"z": matrix})
    total.backward()
    assert total == 0
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------- batch-norm scales


def test_the_scale_penalty_is_the_sum_of_the_largest_magnitudes() -> None:
    scales = [torch.tensor([0.5, -2.0, 1.0]), torch.tensor([-0.1]), torch.tensor([3.0, 1.0])]
    assert float(batch_norm_penalty(scales)) == pytest.approx(5.1)


def test_the_gradient_of_the_scale_penalty_is_the_sign_of_the_largest() -> None:
    scales = [torch.tensor([0.5, -2.0, 1.0], requires_grad=True), torch.tensor([-0.1, 0.0], requires_grad=True)]
    first, second = torch.autograd.grad(batch_norm_penalty(scales), scales)
    assert first.tolist() == [0, -1, 0]
    assert second.tolist() == [-1, 0]


def test_the_scale_penalty_takes_as_many_operators_for_many_norms_as_for_few() -> None:
    def operators(norms: int) -> int:
        scales = [torch.randn(channels, requires_grad=True) for channels in (8, 24) for _ in range(norms)]
        with Operators() as counted:
            torch.autograd.grad(batch_norm_penalty(scales), scales)
        return counted.count

    assert operators(40) == operators(2)


def test_without_batch_norms_there_is_no_scale_penalty() -> None:
    assert float(batch_norm_penalty([])) == 0
