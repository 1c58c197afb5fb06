"""Weight normalisation in a pass each way, of nvae/kernels/weight_norm.py: values and gradients are PyTorch's."""

import pytest
import torch

from nvae.bricks import convolutions
from nvae.kernels import fusion, weight_norm

pytestmark = pytest.mark.usefixtures("passes_of_any_size")


def test_it_is_the_plain_function_bit_for_bit() -> None:
    weight, log_gain, grad = torch.randn(3, 5, 36), torch.randn(3, 5, 1), torch.randn(3, 5, 36)
    weight[0, 0] = 0  # where the norm has no derivative
    parameters = weight.requires_grad_(), log_gain.requires_grad_()
    expected, found = convolutions.weight_norm.plain(*parameters), weight_norm.weight_norm(*parameters)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(made, parameters, grad) for made in (found, expected)]
    assert all(map(torch.equal, *gradients))


def test_few_numbers_on_a_cpu_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "ANY_SIZE", ("cpu",))
    assert weight_norm.weight_norm(torch.randn(2, 3, 4), torch.randn(2, 3, 1)) is NotImplemented
