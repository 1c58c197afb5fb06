"""The network of one, two and three levels: shapes, wiring, and what reaches what (spec_vqvae §3)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nvae.bricks.quantiser import Quantised, Quantiser, QuantiserConfig, after_update
from nvae.models.vqvae.network import Down, Network, Shape, Up

SHAPE = Shape(channels=8, residual=4, blocks=1)
FACTORS = [(4,), (2, 2), (4, 2), (2, 4), (2, 2, 2), (4, 2, 2)]


def network(factors: tuple[int, ...], **fields: Any) -> Network:
    return Network(3, 3, SHAPE, QuantiserConfig(codes=5, dim=4, **fields), factors)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 16)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_down_and_up_are_each_others_shape(factor: int) -> None:
    down, up = Down(3, SHAPE, factor), Up(8, 3, SHAPE, factor)
    x = images()
    assert down(x).shape == (2, 8, 32 // factor, 16 // factor)
    assert up(down(x)).shape == x.shape


@pytest.mark.parametrize("factors", FACTORS)
def test_maps_are_top_down_and_the_image_has_its_size(factors: tuple[int, ...]) -> None:
    model, x = network(factors).eval(), images()
    found = model.quantise(model.encode(x))
    scale, expected = 1, []
    for factor in factors:
        scale *= factor
        expected.insert(0, (2, 32 // scale, 16 // scale))
    assert [tuple(quantised.indices.shape) for quantised in found] == expected
    assert model.decode([quantised.output for quantised in found]).shape == x.shape


@pytest.mark.parametrize("factors", FACTORS)
def test_indices_decode_to_what_their_values_decode_to(factors: tuple[int, ...]) -> None:
    model = network(factors).eval()
    found = model.quantise(model.encode(images()))
    values = model.values([quantised.indices for quantised in found])
    for value, quantised in zip(values, found, strict=True):
        assert torch.equal(value, quantised.output)


@pytest.mark.parametrize("factors", FACTORS)
def test_every_parameter_receives_a_gradient(factors: tuple[int, ...]) -> None:
    model = network(factors)
    found = model.quantise(model.encode(images()))
    decoded = model.decode([quantised.output for quantised in found])
    (decoded.square().mean() + torch.stack([quantised.commitment for quantised in found]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_what_lies_below_depends_on_the_codes_above() -> None:
    model = network((2, 2, 2)).eval()
    encoded = model.encode(images())
    plain = model.quantise(encoded)

    def other_top(number: int, quantiser: Quantiser, vectors: Tensor) -> Quantised:
        moved = quantiser(vectors)
        return quantiser(quantiser.values((moved.indices + 1) % 5)) if number == 0 else moved

    changed = model.quantise(encoded, other_top)
    assert torch.equal(changed[0].indices, (plain[0].indices + 1) % 5)
    for below in (1, 2):
        assert not torch.equal(changed[below].commitment, plain[below].commitment)


def test_every_level_of_codes_reaches_the_image() -> None:
    model = network((2, 2, 2)).eval()
    values = [torch.randn(1, 4, 4 * 2**level, 2 * 2**level, requires_grad=True) for level in range(3)]
    model.decode(values).square().sum().backward()
    for value in values:
        assert value.grad is not None
        assert value.grad.abs().min() > 0


@pytest.mark.parametrize("factors", [(4,), (2, 2), (2, 2, 2)])
def test_recomputation_changes_neither_gradients_nor_codebooks(factors: tuple[int, ...]) -> None:
    plain, again = network(factors), network(factors)
    again.load_state_dict(plain.state_dict())
    for module in again.modules():
        if isinstance(module, Down | Up):
            module.recompute = True
    x = images(4)
    for model in (plain, again):
        found = model.quantise(model.encode(x))
        loss = model.decode([quantised.output for quantised in found]).square().mean()
        (loss + torch.stack([quantised.commitment for quantised in found]).sum()).backward()
        after_update(model.quantisers(), 0, 0, 0.0)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    for ours, others in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, others.grad)


def test_the_encoders_extra_relu_is_only_there_where_it_is_asked_for() -> None:
    with_relu = Down(3, Shape(8, 4, 1, relu_before_blocks=True), 4)
    without = Down(3, SHAPE, 4)
    without.load_state_dict(with_relu.state_dict())
    x = images()
    assert not torch.equal(with_relu(x), without(x))
    with_relu.blocks, without.blocks = torch.nn.Sequential(), torch.nn.Sequential()
    assert torch.equal(with_relu(x), without(x))
