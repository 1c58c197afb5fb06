"""Weight-normalised, masked convolutions, and their effective weights made once for a whole model."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.bricks import convolutions
from nvae.bricks.convolutions import Conv2d, EffectiveWeights, weight_norm

KINDS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "3x3": {"kernel_size": 3},
    "without bias": {"kernel_size": 3, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "depthwise": {"kernel_size": 5, "groups": 4},
    "groups": {"kernel_size": 3, "groups": 2},
    "plain": {"kernel_size": 3, "normalised": False, "bias": False},
    "masked": {"kernel_size": 3, "mask": (torch.arange(9) < 5).float().reshape(3, 3)},
    "masked and plain": {"kernel_size": 3, "mask": (torch.arange(9) < 5).float().reshape(3, 3), "normalised": False},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def naive_weight(convolution: Conv2d) -> Tensor:
    """The effective weight by the words of spec §1, one output channel at a time."""
    rows = []
    for o in range(convolution.weight.shape[0]):
        v = convolution.weight[o].double()
        if convolution.mask is not None:
            v = v * convolution.mask[o]
        if convolution.normalised:
            v = torch.exp(convolution.log_gain[o].double()) * v / (v.square().sum().sqrt() + 1e-5)
        rows.append(v)
    return torch.stack(rows).float()


class Network(nn.Module):
    """Two convolutions of each kind, in parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(Conv2d(4, 4, **kind) for kind in KINDS.values() for _ in range(2))
        self.weights = EffectiveWeights(self)

    def forward(self, x: Tensor) -> Tensor:
        self.weights.refresh()
        total: Tensor = sum(convolution(x).mean() for convolution in self.convolutions)  # type: ignore[assignment]
        return total


# ---------------------------------------------------------------------------------------------------- one convolution


@EVERY_KIND
def test_the_effective_weight_is_that_of_the_spec(kind: dict[str, Any]) -> None:
    convolution = Conv2d(4, 8, **kind)
    torch.testing.assert_close(convolution.effective_weight(), naive_weight(convolution))


@EVERY_KIND
def test_a_convolution_multiplies_with_its_effective_weight(kind: dict[str, Any]) -> None:
    convolution, x = Conv2d(4, 8, **kind), torch.randn(2, 4, 8, 8)
    size, dilation = kind.get("kernel_size", 1), kind.get("dilation", 1)
    expected = F.conv2d(
        x,
        naive_weight(convolution),
        convolution.bias,
        stride=kind.get("stride", 1),
        padding=size // 2 * dilation,
        dilation=dilation,
        groups=kind.get("groups", 1),
    )
    torch.testing.assert_close(convolution(x), expected)


@EVERY_KIND
def test_the_size_is_kept_or_divided_by_the_stride(kind: dict[str, Any]) -> None:
    assert Conv2d(4, 8, **kind)(torch.randn(1, 4, 8, 8)).shape == (1, 8, *[8 // kind.get("stride", 1)] * 2)


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_the_gain_starts_at_the_norm_of_what_the_mask_leaves(gain: float) -> None:
    convolution = Conv2d(4, 8, **KINDS["masked"], initial_gain=gain)
    assert convolution.mask is not None
    norm = (convolution.weight * convolution.mask).flatten(1).norm(dim=1)
    expected = torch.log(norm + 1e-2) + math.log(gain)
    torch.testing.assert_close(convolution.log_gain, expected.reshape(8, 1, 1, 1))


def test_masked_connections_have_no_gradient() -> None:
    convolution = Conv2d(4, 8, **KINDS["masked"])
    convolution(torch.randn(2, 4, 8, 8)).square().sum().backward()
    assert convolution.weight.grad is not None
    assert (convolution.weight.grad[:, :, 1, 2:] == 0).all()
    assert (convolution.weight.grad[:, :, 2] == 0).all()
    assert (convolution.weight.grad[:, :, 0] != 0).all()


def test_kernels_start_as_those_of_pytorch() -> None:
    ours, theirs = Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3)
    assert ours.bias is not None
    assert theirs.bias is not None
    bound = 1 / math.sqrt(64 * 9)
    for parameter, reference in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert float(parameter.detach().std()) == pytest.approx(float(reference.detach().std()), rel=0.25)


def test_a_zero_kernel_gives_zeros_and_finite_gradients() -> None:
    weight, log_gain = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    result = weight_norm(weight, log_gain)
    result.sum().backward()
    assert (result == 0).all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_the_derivative_of_weight_norm_is_that_of_finite_differences() -> None:
    weight, log_gain = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(weight_norm, (weight, log_gain))


# ------------------------------------------------------------------------------------------ those of a whole model


def test_weights_made_in_stages_are_those_made_together_and_so_are_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage holds the first of each kind, the other one the second."""
    network = Network()
    stages = [list(network.convolutions)[first::2] for first in (1, 0)]
    network.weights = EffectiveWeights(network, stages=stages)
    monkeypatch.setattr(convolutions, "is_distributed", lambda: True)

    def gradients() -> list[Tensor]:
        network.zero_grad()
        matrices = network.weights.matrices
        loss = sum(c.effective_weight().square().sum() for c in network.convolutions)
        (loss + sum((matrix**3).sum() for matrix in matrices.values())).backward()
        return [matrix.detach() for matrix in matrices.values()] + [p.grad for p in network.parameters()]

    network.weights.refresh()
    together = gradients()
    network.weights.begin()
    network.weights.reach(1)
    torch.testing.assert_close(gradients(), together, rtol=0, atol=0)


def test_weights_of_a_stage_are_made_when_the_pass_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    first, *others = network.convolutions
    network.weights = EffectiveWeights(network, stages=[[first], others])
    monkeypatch.setattr(convolutions, "is_distributed", lambda: True)
    network.weights.begin()
    assert first._effective is not None and others[0]._effective is None
    network.weights.reach(1)
    assert others[0]._effective is not None


def test_weights_made_together_are_those_made_one_by_one() -> None:
    network = Network()
    network.weights.refresh()
    together = [convolution.effective_weight() for convolution in network.convolutions]
    network.weights.clear()
    for convolution, weight in zip(network.convolutions, together, strict=True):
        torch.testing.assert_close(weight, convolution.effective_weight(), rtol=1e-6, atol=1e-7)


def test_every_convolution_is_in_one_batch_of_matrices() -> None:
    network = Network()
    network.weights.refresh()
    for key, (count, outputs) in network.weights.shapes.items():
        assert network.weights.matrices[key].shape[:2] == (count, outputs)
    assert sum(count for count, _ in network.weights.shapes.values()) == len(network.convolutions)


def test_gradients_through_weights_made_together_are_those_of_single_ones() -> None:
    together, single = Network(), Network()
    single.load_state_dict(together.state_dict())
    x = torch.randn(2, 4, 8, 8)
    together(x).backward()
    single.weights.clear()
    sum(convolution(x).mean() for convolution in single.convolutions).backward()
    for ours, theirs in zip(together.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_without_gradients_weights_are_made_once() -> None:
    network = Network()
    with torch.no_grad():
        network.weights.refresh()
        first = dict(network.weights.matrices)
        network.weights.refresh()
    assert all(network.weights.matrices[key] is matrix for key, matrix in first.items())


def test_with_gradients_weights_are_made_anew() -> None:
    network, x = Network(), torch.randn(2, 4, 8, 8)
    for _ in range(2):
        network(x).backward()  # would fail through a graph that was freed


CHANGES = {
    "one element": lambda network: network.convolutions[0].weight.view(-1)[0].mul_(3),
    "one gain": lambda network: network.convolutions[3].log_gain.add_(1),
    "a loaded state": lambda network: network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()}),
    "another tensor": lambda network: setattr(network.convolutions[1], "weight", nn.Parameter(torch.ones(4, 4, 1, 1))),
    "new data": lambda network: setattr(network.convolutions[1].weight, "data", torch.ones(4, 4, 1, 1)),
    "float64 and back": lambda network: (network.double(), network.convolutions[0].weight.mul_(3), network.float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_parameter_is_noticed(change: Any) -> None:
    network, x = Network(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = network(x)
        change(network)
        after = network(x)
        network.weights.clear()
        expected = sum(convolution(x).mean() for convolution in network.convolutions)
    assert after != before
    torch.testing.assert_close(after, expected)


def test_an_optimiser_step_is_noticed() -> None:
    network, x = Network(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = network(x)
    network(x).backward()
    with torch.no_grad():
        network(x)
    torch.optim.Adamax(network.parameters(), lr=0.1).step()
    with torch.no_grad():
        after = network(x)
        network.weights.clear()
        expected = sum(convolution(x).mean() for convolution in network.convolutions)
    assert after != before
    torch.testing.assert_close(after, expected)


def test_autocast_casts_the_weights_once_and_not_the_matrices() -> None:
    network = Network()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network.weights.refresh()
        assert {c.effective_weight().dtype for c in network.convolutions} == {torch.bfloat16}
        assert {matrix.dtype for matrix in network.weights.matrices.values()} == {torch.float32}
    with torch.no_grad():
        network.weights.refresh()
        assert {c.effective_weight().dtype for c in network.convolutions} == {torch.float32}


@pytest.mark.parametrize("grad", [False, True], ids=["evaluated", "trained"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_independent(copied: Any, grad: bool) -> None:
    network, x = Network(), torch.randn(2, 4, 8, 8)
    with torch.set_grad_enabled(grad):
        before = network(x)
    twin = copied(network)
    with torch.no_grad():
        assert torch.equal(twin(x), before)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), before)
        assert network(x) == 0


def test_forgotten_weights_are_made_at_every_use() -> None:
    network = Network()
    network.weights.refresh()
    network.weights.clear()
    convolution = network.convolutions[0]
    assert convolution.effective_weight() is not convolution.effective_weight()
    assert network.weights.matrices == {}
