"""Images of any size as squares of a model's size, and back.

Shapes: H W image, C colours, S side of a square.
"""

from collections.abc import Iterator

import numpy as np


def grid_of(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of squares that cover an image."""
    return -(-height // side), -(-width // side)


def cut(image: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Squares (C, S, S) of an image (C, H, W), row by row; its last row and column repeated where they reach beyond."""
    _, height, width = image.shape
    rows, columns = grid_of(height, width, side)
    beyond = ((0, 0), (0, rows * side - height), (0, columns * side - width))
    whole = np.pad(image, beyond, mode="edge")
    for row in range(rows):
        for column in range(columns):
            yield whole[:, row * side : (row + 1) * side, column * side : (column + 1) * side]


def joined(tiles: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The image (C, H, W) that was cut into these squares."""
    colours, side, _ = tiles[0].shape
    rows, columns = grid_of(height, width, side)
    whole = np.stack(tiles).reshape(rows, columns, colours, side, side).transpose(2, 0, 3, 1, 4)
    return whole.reshape(colours, rows * side, columns * side)[:, :height, :width]
