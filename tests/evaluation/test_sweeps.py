"""Means over seeds, and recipes beside each other."""

import math
from typing import Any

import pytest

from nvae.evaluation.sweeps import comparison, difference, estimate, mean_of


def entry(nelbo: float, bound: float, error: float = 0.5) -> dict[str, Any]:
    """An entry of results.json of binarised images."""
    values = {"nelbo": nelbo, "bound_1": nelbo, "bound_10": bound}
    estimates = {name: {"nats": value, "standard_error": error} for name, value in values.items()}
    return {"data": "mnist", "likelihood": {"kind": "bernoulli"}, "estimates": estimates}


BASE = {0: entry(10.0, 9.0), 1: entry(12.0, 11.0), 2: entry(14.0, 13.0)}
OTHER = {1: entry(13.0, 12.5), 2: entry(15.0, 13.5), 3: entry(99.0, 99.0)}


def test_the_standard_error_of_a_mean_is_that_of_its_values() -> None:
    found = mean_of([1.0, 2.0, 6.0])
    assert found.value == 3.0
    assert found.error == pytest.approx(math.sqrt(7.0) / math.sqrt(3))  # s² = (4 + 1 + 9) / 2


def test_of_one_seed_the_standard_error_is_over_images() -> None:
    assert estimate({0: entry(10.0, 9.0, 0.25)}, "nelbo", "nats").error == 0.25


def test_differences_are_taken_seed_by_seed_where_both_have_it() -> None:
    found = difference(OTHER, BASE, "bound_10", "nats")
    assert found is not None
    assert found.value == pytest.approx(1.0)  # 1.5 of seed 1 and 0.5 of seed 2
    assert found.error == pytest.approx(0.5)
    assert difference({7: entry(1.0, 1.0)}, BASE, "bound_10", "nats") is None


def test_a_row_for_every_recipe_in_their_order_and_the_first_is_the_base() -> None:
    rows = comparison({"a": BASE, "b": OTHER, "c": {}}, {"a": 1200, "b": 7, "c": 8}).splitlines()
    assert rows[0] == "|  | parameters | seeds | negative ELBO | bound, K = 10 | above a |"
    assert rows[2] == "| a | 1 200 | 3 | 12.000 ± 1.155 | 11.000 ± 1.155 | – |"
    assert rows[3].endswith("| 1.000 ± 0.500 |")
    assert rows[4] == "| c | 8 | 0 | not evaluated | not evaluated | – |"
    assert rows[-1].startswith("nats; ± is the standard error over seeds")
