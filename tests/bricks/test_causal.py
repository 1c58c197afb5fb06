"""Causal layers: what each sees, and that one position at a time gives what a whole map gives (spec_vqvae §4)."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.bricks.causal import (
    AttentionBlock,
    CausalAttention,
    CausalConv2d,
    CodeContext,
    Conv2d,
    GatedBlock,
    Linear,
    Walk,
    WeightNormed,
    places,
)

HEIGHT, WIDTH, CODES = 5, 4, 3
SIDES = [3, 5, 7]


def walked(step: Callable[[int, int, Walk], Tensor]) -> Tensor:
    """The map (B, C, H, W) that steps give."""
    walk = Walk(HEIGHT, WIDTH)
    steps = [step(row, column, walk) for row, column in walk]
    return torch.stack(steps, dim=-1).reshape(*steps[0].shape, HEIGHT, WIDTH)


def seen_by(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(P, P): entry (i, j) says whether the result at position i depends on the input's at j."""
    return torch.stack([row_of(layer, x, i) for i in range(HEIGHT * WIDTH)])


def row_of(layer: Callable[[Tensor], Tensor], x: Tensor, i: int) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).flatten(2)[:, :, i].square().sum(), x, allow_unused=True)
    return torch.zeros(HEIGHT * WIDTH, dtype=torch.bool) if gradient is None else gradient.flatten(2).any(1).any(0)


def earlier() -> Tensor:
    return torch.ones(HEIGHT * WIDTH, HEIGHT * WIDTH).tril(-1).bool()


# --------------------------------------------------------------------------------------------------- weight and kernel


def test_the_weight_is_that_of_weight_norm() -> None:
    ours = Conv2d(4, 6, 3)
    theirs = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1), dim=0)
    theirs.parametrizations.weight.original0.data = ours.gain.data * torch.rand(6, 1, 1, 1)
    theirs.parametrizations.weight.original1.data, theirs.bias.data = ours.direction.data, ours.bias.data
    ours.gain.data = theirs.parametrizations.weight.original0.data
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_at_the_start_the_gain_is_the_length() -> None:
    layer = WeightNormed((3, 4, 5, 5))
    torch.testing.assert_close(layer.weight(), layer.direction)


@pytest.mark.parametrize("side", SIDES)
def test_removed_taps_hold_nothing_learn_nothing_and_shorten_nothing(side: int) -> None:
    layer = CausalConv2d(2, 3, side)
    removed = layer.direction.detach()[:, :, -1, side // 2 :]
    assert removed.abs().max() == 0
    layer(torch.randn(1, 2, HEIGHT, WIDTH)).square().sum().backward()
    assert layer.direction.grad is not None
    assert layer.direction.grad[:, :, -1, side // 2 :].abs().max() == 0
    layer.direction.data[:, :, -1, side // 2 :] = 7.0
    kept = layer.weight().detach()
    layer.direction.data[:, :, -1, side // 2 :] = 0.0
    assert torch.equal(kept, layer.weight())


@pytest.mark.parametrize("side", SIDES)
def test_a_causal_convolution_sees_its_rows_above_and_the_left_of_its_own(side: int) -> None:
    expected = torch.zeros(HEIGHT, WIDTH, HEIGHT, WIDTH, dtype=torch.bool)
    for i, j, y, x in product(range(HEIGHT), range(WIDTH), range(HEIGHT), range(WIDTH)):
        near = 0 <= i - y < side and abs(j - x) <= side // 2
        expected[i, j, y, x] = near and (y < i or x < j)
    seen = seen_by(CausalConv2d(2, 3, side), torch.randn(1, 2, HEIGHT, WIDTH))
    assert torch.equal(seen, expected.reshape(seen.shape))


# ----------------------------------------------------------------------------------------------------------- contexts


@pytest.mark.parametrize("side", SIDES)
def test_the_context_is_the_sum_of_two_shifted_convolutions_of_one_hot_codes(side: int) -> None:
    layer, codes, half = CodeContext(CODES, 6, side), torch.randint(CODES, (2, HEIGHT, WIDTH)), side // 2
    one_hot = F.one_hot(codes, CODES).movedim(-1, 1).float()
    over = F.conv2d(F.pad(one_hot, (half, half, half - 1, 0)), layer.over.weight(), layer.over.bias)
    left = F.conv2d(F.pad(one_hot, (half - 1, 0, half, 0)), layer.left.weight(), layer.left.bias)
    expected = F.pad(over, (0, 0, 1, 0))[:, :, :-1] + F.pad(left, (1, 0))[:, :, :, :-1]
    torch.testing.assert_close(layer(codes), expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_step_of_the_context_looks_at_no_code_from_its_position_on(side: int) -> None:
    layer, codes = CodeContext(CODES, 6, side), torch.randint(CODES, (2, HEIGHT, WIDTH))

    def step(row: int, column: int, walk: Walk) -> Tensor:
        known = codes.flatten(1).clone()
        known[:, row * WIDTH + column :] = torch.randint(CODES, known[:, row * WIDTH + column :].shape)
        return layer.step(known.reshape(codes.shape), walk)

    torch.testing.assert_close(walked(step), layer(codes))


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_is_the_sum_over_earlier_positions() -> None:
    layer, x, y = CausalAttention(6, 5, 16).double(), torch.randn(2, 6, 5, 4).double(), torch.randn(2, 5, 5, 4).double()
    q, k, v = layer.query(x.flatten(2).mT), layer.key(y.flatten(2).mT), layer.value(y.flatten(2).mT)
    expected = torch.zeros(2, 16, HEIGHT * WIDTH).double()
    for head in range(8):
        part = slice(2 * head, 2 * head + 2)
        for i in range(1, HEIGHT * WIDTH):
            scores = (k[:, :i, part] @ q[:, i, part, None]).squeeze(2) / 2**0.5
            expected[:, part, i] = (scores.softmax(1)[:, :, None] * v[:, :i, part]).sum(1)
    torch.testing.assert_close(layer(x, y).flatten(2), expected)


def test_attention_on_a_map_of_one_position_is_zero() -> None:
    assert CausalAttention(6, 5, 16)(torch.randn(2, 6, 1, 1), torch.randn(2, 5, 1, 1)).abs().sum() == 0


def test_places_are_centred_fractions() -> None:
    place = places(4, 2)[0]
    assert place[0, :, 0].tolist() == [-0.5, -0.25, 0, 0.25]
    assert place[1, 0].tolist() == [-0.5, 0]


# -------------------------------------------------------------------------------------------- blocks, in both manners


def causal(before: int, after: int) -> CausalConv2d:
    return CausalConv2d(before, after, 3)


@pytest.mark.parametrize("attention", [True, False])
def test_a_block_sees_earlier_positions_and_its_own_input(attention: bool) -> None:
    block = AttentionBlock(16, 8, 3, 2, attention=attention)
    x, place = torch.randn(1, 16, HEIGHT, WIDTH), places(HEIGHT, WIDTH)
    seen = seen_by(lambda x: block(x, place), x)
    allowed = earlier() | torch.eye(HEIGHT * WIDTH, dtype=torch.bool)
    assert torch.equal(seen, allowed if attention else seen & allowed)
    assert seen.diagonal().all()


def assert_steps_equal_the_whole(layer: nn.Module, whole: Tensor, step: Callable[[int, int, Walk], Tensor]) -> None:
    torch.testing.assert_close(walked(step), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_steps_of_a_causal_convolution_equal_the_whole(side: int) -> None:
    layer, x = CausalConv2d(3, 4, side).double(), torch.randn(2, 3, HEIGHT, WIDTH).double()
    assert_steps_equal_the_whole(layer, layer(x), lambda i, j, walk: layer.step(x[:, :, i, j], walk))


def test_steps_of_attention_equal_the_whole() -> None:
    layer = CausalAttention(3, 4, 16).double()
    x, y = torch.randn(2, 3, HEIGHT, WIDTH).double(), torch.randn(2, 4, HEIGHT, WIDTH).double()
    assert_steps_equal_the_whole(layer, layer(x, y), lambda i, j, walk: layer.step(x[:, :, i, j], y[:, :, i, j], walk))


@pytest.mark.parametrize("spread", [True, False], ids=["condition a map", "the same everywhere"])
def test_steps_of_a_gated_block_equal_the_whole(spread: bool) -> None:
    layer = GatedBlock(4, 6, causal, auxiliary=3, condition=5).double()
    x, auxiliary = torch.randn(2, 4, HEIGHT, WIDTH).double(), torch.randn(2, 3, HEIGHT, WIDTH).double()
    condition = torch.randn(2, 5, *((HEIGHT, WIDTH) if spread else (1, 1))).double()
    assert_steps_equal_the_whole(
        layer,
        layer(x, auxiliary, condition),
        lambda i, j, walk: layer.step(x[:, :, i, j], walk, auxiliary[:, :, i, j], condition),
    )


@pytest.mark.parametrize("attention", [True, False])
def test_steps_of_a_block_equal_the_whole(attention: bool) -> None:
    layer = AttentionBlock(16, 8, 5, 2, attention=attention, condition=3).double()
    x, place = torch.randn(2, 16, HEIGHT, WIDTH).double(), places(HEIGHT, WIDTH)
    condition = torch.randn(2, 3, HEIGHT, WIDTH).double()
    assert_steps_equal_the_whole(
        layer, layer(x, place, condition), lambda i, j, walk: layer.step(x[:, :, i, j], place, walk, condition)
    )


def test_a_condition_without_a_class_or_map_adds_nothing() -> None:
    layer, x = GatedBlock(4, 6, causal, condition=5), torch.randn(2, 4, HEIGHT, WIDTH)
    torch.testing.assert_close(layer(x, condition=torch.zeros(2, 5, 1, 1)), layer(x))


def test_dropout_acts_in_training_only() -> None:
    layer, x = GatedBlock(4, 6, causal, dropout=0.5), torch.randn(2, 4, HEIGHT, WIDTH)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_linear_is_weight_normed_per_output() -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    layer.gain.data.fill_(2.0)
    directions = layer.direction / layer.direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), 2 * x @ directions.T + layer.bias)
