"""Dense convolutions of bfloat16 tensors in float16, and their gradients, against PyTorch's in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvae import bfloat16, dense
from nvae.convolutions import Conv2d
from nvae.flows import ShiftCell
from nvae.normalisation import BatchNorm

pytestmark = pytest.mark.skipif(not bfloat16.pays(dense.SOURCE), reason="no processor that multiplies float16 faster")

ROUNDING = 1.25 * 2**-9
"""Of results, both as root mean squares: rounding them to bfloat16 alone makes 0.85 · 2⁻⁹."""
SHAPES: dict[str, dict[str, Any]] = {
    "1x1, wide": {"x": (3, 40, 8, 8), "kernel": (96, 1, 1)},
    "1x1, narrow": {"x": (2, 130, 5, 7), "kernel": (9, 1, 1)},
    "3x3": {"x": (2, 33, 9, 6), "kernel": (40, 3, 3)},
    "3x3, deep": {"x": (1, 200, 4, 4), "kernel": (17, 3, 3)},
    "dilated": {"x": (2, 8, 12, 10), "kernel": (8, 3, 3), "dilation": 2},
    "two rows": {"x": (2, 5, 6, 6), "kernel": (30, 2, 3), "before": (1, 1)},
    "two rows, the other way": {"x": (2, 5, 6, 6), "kernel": (30, 2, 3), "before": (0, 1)},
    "more than the cache holds": {"x": (1, 64, 70, 150), "kernel": (8, 3, 3)},
    "one pixel": {"x": (1, 30, 1, 1), "kernel": (40, 3, 3)},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def root_mean_square(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, before: tuple[int, int] | None) -> Tensor:
    """By PyTorch's convolution of the padded input."""
    sides = [(side - 1) * dilation for side in weight.shape[2:]]
    top, left = before or [side // 2 for side in sides]
    padded = F.pad(x, (left, sides[1] - left, top, sides[0] - top))
    return F.conv2d(padded, weight, bias, dilation=dilation)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert root_mean_square(found.double() - wanted) <= ROUNDING * root_mean_square(wanted)


@EVERY_SHAPE
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e9], ids=["ordinary", "tiny", "huge"])
def test_values_and_gradients_are_those_of_float64(shape: dict[str, Any], size: float) -> None:
    """Also of numbers beyond float16's range."""
    x = (size * torch.randn(shape["x"])).bfloat16().requires_grad_()
    outputs, *sides = shape["kernel"]
    weight = torch.randn(outputs, shape["x"][1], *sides).bfloat16().requires_grad_()
    bias = (size * torch.randn(outputs)).requires_grad_()
    dilation, before = shape.get("dilation", 1), shape.get("before")
    leaves = (x, weight, bias)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, wanted = dense.conv2d(x, weight, bias, dilation, before), expected(*wide, dilation, before)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, wanted)
    grad = (size * torch.randn(found.shape)).bfloat16()
    theirs = torch.autograd.grad(wanted, wide, grad.double())
    for mine, other, leaf in zip(torch.autograd.grad(found, leaves, grad), theirs, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert_close(mine, other)


def test_each_image_has_its_own_scale() -> None:
    """One with small gradients is as precise as one with large ones."""
    x, weight = torch.randn(2, 16, 6, 6).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16()
    grad = torch.randn(2, 16, 6, 6).bfloat16()
    grad[1] *= 1e-9
    found = dense.input_gradient(grad, weight)
    wanted = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
    for image in range(2):
        assert_close(found[image], wanted[image])
    for image in range(2):
        alone, _ = dense.parameter_gradients(grad[image : image + 1], x[image : image + 1], (3, 3))
        exact = torch.nn.grad.conv2d_weight(
            x[image : image + 1].double(), weight.shape, grad[image : image + 1].double(), padding=1
        )
        assert_close(alone, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x, weight = torch.randn(2, 4, 5, 5).bfloat16(), torch.randn(4, 4, 3, 3).bfloat16()
    x[1, 2, 3, 3] = value
    with torch.no_grad():
        found = dense.conv2d(x, weight, None)
    assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().all())
    assert not bool(dense.parameter_gradients(x, x, (3, 3))[0].isfinite().all())


def test_zeros_and_empty_batches() -> None:
    x, weight = torch.zeros(2, 4, 5, 5).bfloat16(), torch.zeros(6, 4, 3, 3).bfloat16()
    with torch.no_grad():
        assert not bool(dense.conv2d(x, weight, None).any())
        assert dense.conv2d(x[:0], weight, None).shape == (0, 6, 5, 5)
    assert not bool(dense.parameter_gradients(x[:0, :1].expand(0, 6, 5, 5), x[:0], (3, 3), bias=True)[0].any())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing_but_the_order_of_sums(threads: int) -> None:
    x, grad, weight = (torch.randn(shape).bfloat16() for shape in ((1, 8, 16, 6), (1, 12, 16, 6), (12, 8, 3, 3)))
    found, before = [], torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        with torch.no_grad():
            values = dense.conv2d(x, weight, None), dense.input_gradient(grad, weight)
        found.append((*values, dense.parameter_gradients(grad, x, (3, 3))[0]))
        again = dense.parameter_gradients(grad, x, (3, 3))[0]
        assert torch.equal(found[-1][2], again)
    torch.set_num_threads(before)
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other.double())


@pytest.mark.parametrize("grad", [False, True])
def test_a_convolution_under_autocast_is_one_of_these(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all its forms: alone, with an activation, behind a batch norm, in a flow; and only in bfloat16."""
    taken = []
    for name in ("conv2d", "input_gradient", "parameter_gradients"):
        original = getattr(dense, name)
        monkeypatch.setattr(
            dense, name, lambda *args, name=name, original=original, **kw: taken.append(name) or original(*args, **kw)
        )
    convolution, norm = Conv2d(4, 6, 3), BatchNorm(4, "swish").train()
    flow = ShiftCell(4, mirrored=True)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    forms = (convolution, lambda x: convolution(x, "swish"), lambda x: norm.into(convolution, x), flow)
    for form in forms:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            y = form(x)
        if grad:
            y.float().sum().backward()
        expected_calls = {"conv2d", "input_gradient", "parameter_gradients"} if grad else {"conv2d"}
        assert set(taken) == expected_calls
        taken.clear()
        form(x)
        assert not taken


def test_compiled_it_is_one_operator_and_the_same() -> None:
    convolution = Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients(function: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, convolution.weight, convolution.bias])

    compiled = torch.compile(convolution, backend="aot_eager", fullgraph=True)
    for mine, other in zip(gradients(compiled), gradients(convolution), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_operators_keep_what_compilers_are_told_of_them() -> None:
    x = torch.randn(2, 4, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 4, 2, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(dense.forward_operator, (x, weight, torch.randn(6), [2, 3, 1, 1, 1]), test_utils=tests)


@pytest.mark.parametrize(
    ("x", "weight", "stride", "groups"),
    [
        (torch.float32, torch.float32, 1, 1),
        (torch.bfloat16, torch.float32, 1, 1),
        (torch.float64, torch.float64, 1, 1),
        (torch.bfloat16, torch.bfloat16, 2, 1),
        (torch.bfloat16, torch.bfloat16, 1, 2),
    ],
)
def test_others_are_pytorchs(x: torch.dtype, weight: torch.dtype, stride: int, groups: int) -> None:
    assert not dense.takes(torch.zeros(1, 2, 3, 3, dtype=x), torch.zeros(2, 1, 3, 3, dtype=weight), stride, groups)
