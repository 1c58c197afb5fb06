"""Images of any size, cut and joined."""

import numpy as np
import pytest

from nvae.codec.tiles import cut, grid_of, joined


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (9, 17), (16, 7)])
def test_cutting_and_joining_gives_the_image(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, height, width))
    squares = list(cut(image, 8))
    assert len(squares) == np.prod(grid_of(height, width, 8))
    assert {square.shape for square in squares} == {(3, 8, 8)}
    np.testing.assert_array_equal(joined(squares, height, width), image)


def test_beyond_the_image_its_edge_goes_on() -> None:
    (square,) = cut(np.arange(6).reshape(1, 2, 3), 4)
    np.testing.assert_array_equal(square[0], [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]])
