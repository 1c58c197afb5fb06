"""Inverse-autoregressive flows: what a shift may see, volume, inverse."""

import math

import pytest
import torch
from torch import Tensor

from nvae.bricks.flows import FlowCell, ShiftCell, causal_mask, earlier_pixels

CHANNELS, HEIGHT, WIDTH = 3, 5, 4
SIZE = CHANNELS * HEIGHT * WIDTH
DIRECTIONS = pytest.mark.parametrize("mirrored", [False, True], ids=["forwards", "backwards"])


def lively(cell: ShiftCell | FlowCell) -> ShiftCell | FlowCell:
    """The cell in float64 with shifts as large as z."""
    for name, parameter in cell.named_parameters():
        if name.endswith("log_gain"):
            parameter.data.normal_(0.5, 0.3)
    return cell.double()


def in_order(z: Tensor, mirrored: bool) -> Tensor:
    """(L, h, w) as a vector in the flow's order: row, then column, then channel; mirrored, pixels from the last."""
    pixels = z.permute(1, 2, 0).reshape(HEIGHT * WIDTH, CHANNELS)
    return (pixels.flip(0) if mirrored else pixels).flatten()


def dependence(cell: ShiftCell, mirrored: bool) -> Tensor:
    """(SIZE, SIZE) booleans: whether the shift of element i moves when element j does, both in the flow's order.

    Moves by more than the rounding of float64, which depends on an image's place in the batch.
    """
    z = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64).expand(SIZE + 1, -1, -1, -1).clone()
    order = in_order(torch.arange(SIZE).reshape(CHANNELS, HEIGHT, WIDTH), mirrored)
    z.flatten(1)[torch.arange(SIZE), order] += 1.0
    with torch.no_grad():
        *moved, unmoved = cell.shift(z)
    changes = [in_order(shift - unmoved, mirrored) for shift in moved]
    return torch.stack(changes, dim=1).abs() > 1e-13


@DIRECTIONS
def test_shift_never_sees_its_own_position_nor_a_later_one(mirrored: bool) -> None:
    cell = lively(ShiftCell(CHANNELS, mirrored))
    assert isinstance(cell, ShiftCell)
    seen = dependence(cell, mirrored)
    assert not seen.triu().any()


@DIRECTIONS
def test_shift_has_no_derivative_by_its_own_position_nor_by_a_later_one(mirrored: bool) -> None:
    """Exactly zero."""
    cell = lively(ShiftCell(CHANNELS, mirrored))
    assert isinstance(cell, ShiftCell)
    z = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(cell.shift, z).reshape(SIZE, SIZE)
    order = in_order(torch.arange(SIZE).reshape(CHANNELS, HEIGHT, WIDTH), mirrored)
    assert (jacobian[order][:, order].triu() == 0).all()


@DIRECTIONS
def test_shift_sees_the_element_just_before(mirrored: bool) -> None:
    """Within a pixel the channel before; across pixels the last channel of the pixel before, in the same row."""
    cell = lively(ShiftCell(CHANNELS, mirrored))
    assert isinstance(cell, ShiftCell)
    seen = dependence(cell, mirrored).diagonal(-1)
    starts_a_row = torch.tensor([(i + 1) % (WIDTH * CHANNELS) == 0 for i in range(SIZE - 1)])
    assert seen[~starts_a_row].all()


@DIRECTIONS
def test_shift_sees_every_channel_of_the_pixels_before(mirrored: bool) -> None:
    cell = lively(ShiftCell(CHANNELS, mirrored))
    assert isinstance(cell, ShiftCell)
    seen = dependence(cell, mirrored).reshape(HEIGHT * WIDTH, CHANNELS, HEIGHT * WIDTH, CHANNELS)
    centre = 2 * WIDTH + 2 if not mirrored else 2 * WIDTH + 1
    for before in (1, WIDTH, WIDTH - 1, WIDTH + 1):
        assert seen[centre, :, centre - before].all()


def test_the_first_shift_is_a_constant() -> None:
    cell = lively(ShiftCell(CHANNELS, mirrored=False))
    assert isinstance(cell, ShiftCell)
    shifts = cell.shift(torch.randn(4, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64))[:, 0, 0, 0]
    torch.testing.assert_close(shifts, shifts[0].expand(4), rtol=0, atol=1e-14)


@DIRECTIONS
def test_a_cell_subtracts_its_shift(mirrored: bool) -> None:
    cell = ShiftCell(CHANNELS, mirrored)
    z = torch.randn(2, CHANNELS, HEIGHT, WIDTH)
    assert torch.equal(cell(z), z - cell.shift(z))


def test_the_log_determinant_is_zero() -> None:
    cell = lively(FlowCell(CHANNELS))
    z = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(cell, z).reshape(SIZE, SIZE)
    sign, log_determinant = torch.linalg.slogdet(jacobian)
    assert sign == 1
    assert abs(float(log_determinant)) < 1e-10
    assert (jacobian - torch.eye(SIZE)).abs().max() > 0.1, "the flow does something"


def test_a_flow_cell_looks_both_ways() -> None:
    """Every element can move every other one's image, directly or not; here the first and the last do."""
    cell = lively(FlowCell(CHANNELS))
    jacobian = torch.autograd.functional.jacobian(cell, torch.randn(1, CHANNELS, 2, 2, dtype=torch.float64))
    assert jacobian[0, 0, 0, 0, 0, CHANNELS - 1, 1, 1] != 0
    assert jacobian[0, CHANNELS - 1, 1, 1, 0, 0, 0, 0] != 0


def test_the_inverse_gives_back_the_input_exactly() -> None:
    cell = lively(ShiftCell(CHANNELS, mirrored=True))
    assert isinstance(cell, ShiftCell)
    z = torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(cell.inverse(cell(z), tolerance=0), z, rtol=0, atol=1e-9)


def test_a_fresh_flow_inverts_in_float32() -> None:
    cell, z = FlowCell(CHANNELS), torch.randn(2, CHANNELS, HEIGHT, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(cell.inverse(cell(z)), z, rtol=0, atol=1e-5)


def test_a_fresh_flow_hardly_shifts() -> None:
    """The last gain starts ten times lower."""
    cell, z = ShiftCell(20, mirrored=False), torch.randn(2, 20, 8, 8)
    assert cell.shift(z).std() < 0.1 * z.std()
    norm = (cell.project.weight * cell.project.mask).flatten(1).norm(dim=1)
    torch.testing.assert_close(cell.project.log_gain.flatten(), torch.log(norm + 1e-2) - math.log(10))


def test_the_second_mask_is_the_first_turned_by_half_a_turn() -> None:
    at_centre = torch.rand(4, 3) > 0.5
    for size in (3, 5):
        forwards = causal_mask(earlier_pixels(size, False), at_centre)
        backwards = causal_mask(earlier_pixels(size, True), at_centre)
        assert torch.equal(forwards.rot90(2, (2, 3)), backwards)


def test_pixels_before_the_centre_are_the_rows_above_and_those_to_the_left() -> None:
    assert earlier_pixels(3, False).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_the_masks_of_two_channels_are_those_of_the_spec() -> None:
    cell = ShiftCell(2, mirrored=False)
    assert cell.expand.mask is not None
    assert cell.spatial.mask is not None
    assert cell.project.mask is not None
    own = torch.arange(12) // 6
    assert torch.equal(cell.expand.mask[:, :, 1, 1], torch.stack([own > 0, own > 1], dim=1).float())
    assert (cell.spatial.mask[:, 0, 2, 2] == 1).all()
    assert torch.equal(cell.project.mask[:, :, 0, 0], torch.stack([own <= 0, own <= 1]).float())


def test_only_the_last_convolution_has_a_bias() -> None:
    cell = ShiftCell(2, mirrored=False)
    assert cell.expand.bias is None
    assert cell.spatial.bias is None
    assert cell.project.bias is not None
