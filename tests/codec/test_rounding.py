"""Two machines get the same integers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nvae.codec.rounding import MARGIN, Rounding
from nvae.core.errors import UserError


def numbers() -> Tensor:
    """(2, 1000) of which a tenth lies between two integers almost exactly."""
    values = 100 * torch.randn(2, 1000, dtype=torch.float64)
    values[:, ::10] = values[:, ::10].floor() + 0.5 + MARGIN / 4 * torch.randn(2, 100, dtype=torch.float64).clamp(-3, 3)
    return values


def test_numbers_are_rounded_to_the_nearest_integer() -> None:
    values = torch.tensor([[0.4, 0.6, -0.4, -0.6, 7.0]])
    np.testing.assert_array_equal(Rounding(1)(values, 0), [[0, 1, 0, -1, 7]])


def test_a_reader_that_computes_a_little_otherwise_gets_the_same_integers() -> None:
    values = numbers()
    writer = Rounding(2)
    written = writer(values, 7)
    other = values + 1e-9 * torch.randn_like(values)
    np.testing.assert_array_equal(Rounding(2, writer.noted)(other, 7), written)


def test_without_what_was_noted_it_would_not() -> None:
    values = numbers()
    written = Rounding(2)(values, 7)
    other = values + 1e-6 * torch.randn_like(values)
    assert (Rounding(2, [{}, {}])(other, 7) != written).any()


def test_only_numbers_near_a_middle_are_noted_each_at_its_place() -> None:
    rounding = Rounding(1)
    rounding(torch.tensor([[0.25, 1.5, 2.75]], dtype=torch.float64), 100)
    assert rounding.noted == [{101: False}]


def test_corrections_of_other_places_are_left_alone() -> None:
    values = torch.tensor([[0.25, 1.25]], dtype=torch.float64)
    np.testing.assert_array_equal(Rounding(1, [{9: True, 12: True}])(values, 10), [[0, 1]])


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        Rounding(1)(torch.tensor([[1.0, float("nan")]]), 0)
