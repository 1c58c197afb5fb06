"""Figures of images, put together from parts."""

import torch

from nvae.evaluation.figures import Figures


def part(first: int, codes: list[list[int]]) -> Figures:
    """Of two images."""
    return Figures(
        torch.arange(first, first + 2),
        torch.ones(2),
        torch.ones(2, 2),
        torch.full((2, 1), 2.0),
        {},
        codes=torch.tensor(codes),
    )


def test_codes_are_counted_over_all_parts_and_those_in_use_are_the_active_units() -> None:
    whole = Figures.joined([part(2, [[3, 0, 1], [4, 0, 0]]), part(0, [[0, 0, 4], [4, 0, 0]])])
    assert whole.codes is not None
    assert whole.codes.tolist() == [[3, 0, 5], [8, 0, 0]]
    assert whole.active_units.tolist() == [2, 1]
    assert whole.indices.tolist() == [0, 1, 2, 3]


def test_codes_survive_being_written() -> None:
    again = Figures.from_tensors(part(0, [[1, 1, 0], [2, 0, 0]]).tensors())
    assert again.codes is not None
    assert again.codes.tolist() == [[1, 1, 0], [2, 0, 0]]
