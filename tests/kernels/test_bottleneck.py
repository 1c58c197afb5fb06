"""Bottlenecks in C++ against PyTorch's in float64, on vectors of each width that this processor has."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processors import PROCESSORS, compile_for, needs_compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvae.bricks.bottleneck import Bottleneck
from nvae.bricks.convolutions import Conv2d
from nvae.bricks.flows import ShiftCell
from nvae.bricks.squeeze_excite import SqueezeExcite
from nvae.kernels.cpu import bottleneck as kernels
from nvae.models.nvae.model import NVAE, NVAEConfig

pytestmark = needs_compiler


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is the one for that processor."""
    compile_for(request.param, kernels, monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Only then is the C++ function used."""
    with torch.no_grad():
        yield


def assert_close(found: Tensor, expected: Tensor, error: float = 1e-6) -> None:
    """To an error relative to the largest value, or to 1."""
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= error * max(float(expected.abs().max()), 1.0)


# ------------------------------------------------------------------------------------------------------- bottlenecks

BOTTLENECKS: dict[str, dict[str, Any]] = {
    "a cell of the decoder": {"channels": (16, 96, 16), "size": (16, 16), "gated": True},
    "enlarging": {"channels": (16, 48, 8), "size": (8, 8), "enlarge": True, "gated": True},
    "enlarging, 11 by 11": {"channels": (4, 24, 2), "size": (5, 6), "kernel": 11, "enlarge": True},
    "enlarging, 3 by 3": {"channels": (4, 24, 2), "size": (5, 6), "kernel": 3, "enlarge": True},
    "halving": {"channels": (6, 36, 12), "size": (9, 7), "stride": 2, "gated": True},
    "odd everywhere": {"channels": (3, 17, 5), "size": (13, 11), "gated": True},
    "one pixel": {"channels": (4, 24, 4), "size": (1, 1), "gated": True},
    "more than the cache holds": {"channels": (8, 48, 8), "size": (96, 192), "gated": True},
}


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_a_bottleneck_is_its_three_convolutions(kind: str, images: int) -> None:
    options = {"kernel": 5, "stride": 1, "enlarge": False, "gated": False} | BOTTLENECKS[kind]
    inputs, hidden, outputs = options["channels"]
    geometry = {"stride": options["stride"], "enlarge": options["enlarge"]}
    expand = Conv2d(inputs, hidden, normalised=False).double()
    spatial = Conv2d(hidden, hidden, options["kernel"], groups=hidden, normalised=False, **geometry).double()
    project = Conv2d(hidden, outputs, normalised=False).double()
    gate = SqueezeExcite(outputs).double() if options["gated"] else None
    x = torch.randn(images, inputs, *options["size"], dtype=torch.double)
    y = project(F.silu(spatial(F.silu(expand(x)))))
    skip = torch.randn_like(y)
    expected = skip + 0.1 * y if gate is None else gate(skip, y)
    bottleneck = Bottleneck(expand, spatial, project, gate=gate, scale=0.1)
    assert_close(bottleneck(x.float(), skip.float()), expected)
    in_half = bottleneck(x.bfloat16(), skip.bfloat16())
    assert in_half.dtype == torch.bfloat16
    assert_close(in_half, expected, error=2**-7)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_shift_cell_is_one_without_its_masked_taps(mirrored: bool) -> None:
    cell = ShiftCell(5, mirrored)
    bottleneck = Bottleneck(cell.expand, cell.spatial, cell.project, elu=True, scale=-1.0)
    z = torch.randn(2, 5, 8, 8)
    assert_close(bottleneck(z, z), cell.double()(z.double()))
    assert [len(offsets) for offsets in bottleneck.packed.tensors[6:8]] == [5, 13]  # of 9 and 25


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing_but_rounding(threads: int) -> None:
    """Fewer images than threads are cut into strips, whose edges overlap."""
    expand, project = Conv2d(8, 48, normalised=False), Conv2d(48, 8, normalised=False)
    spatial = Conv2d(48, 48, 5, groups=48, normalised=False)
    bottleneck = Bottleneck(expand, spatial, project, gate=SqueezeExcite(8))
    x, before = torch.randn(1, 8, 16, 16), torch.get_num_threads()
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(bottleneck(x, x))
    torch.set_num_threads(before)
    assert_close(found[1], found[0])


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("elu", [False, True])
def test_what_is_not_a_number_stays_visible(elu: bool) -> None:
    expand, project = Conv2d(2, 12, normalised=False), Conv2d(12, 2, normalised=False)
    spatial = Conv2d(12, 12, 5, groups=12, normalised=False)
    z = torch.randn(1, 2, 8, 8)
    z[0, 0, 2, 2] = torch.nan
    assert bool(Bottleneck(expand, spatial, project, elu=elu)(z, torch.zeros_like(z)).isnan().any())


def test_a_kernel_of_zeros_and_a_batch_of_none() -> None:
    convolutions = [Conv2d(2, 2, normalised=False), Conv2d(2, 2, 5, groups=2, normalised=False)]
    for convolution in convolutions:
        convolution.weight.zero_()
    bottleneck = Bottleneck(convolutions[0], convolutions[1], convolutions[0])
    x = torch.randn(2, 2, 4, 4)
    bias = convolutions[0].bias
    assert bias is not None
    assert_close(bottleneck(x, x), x + bias[:, None, None])
    assert bottleneck(x[:0], x[:0]).shape == (0, 2, 4, 4)


def test_weights_are_packed_again_in_a_copy() -> None:
    """Which may live on another machine."""
    bottleneck = Bottleneck(*passing_on())
    x = torch.randn(1, 1, 3, 3)
    copy = deepcopy(bottleneck)
    assert copy.packed is not None and copy.packed.tensors[0] is not bottleneck.packed.tensors[0]
    assert_close(copy(x, x), bottleneck(x, x))


def passing_on() -> tuple[Conv2d, Conv2d, Conv2d]:
    """All three convolutions pass on what they get: two channels of it, and their sum in the end."""
    spatial = Conv2d(2, 2, groups=2, normalised=False)
    expand = Conv2d(1, 2, normalised=False)
    project = Conv2d(2, 1, normalised=False)
    for convolution in (expand, spatial, project):
        convolution.weight.fill_(1.0)
        assert convolution.bias is not None
        convolution.bias.zero_()
    return expand, spatial, project


@pytest.mark.parametrize("value", [-1e30, -1e4, -100.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("elu", [False, True])
@pytest.mark.usefixtures("processor")
def test_activations_far_out(value: float, elu: bool) -> None:
    expand, spatial, project = passing_on()
    x = torch.full((1, 1, 2, 2), value)
    u = x.double()
    activated = F.elu(F.elu(F.elu(u))) if elu else F.silu(F.silu(u))
    found = Bottleneck(expand, spatial, project, elu=elu)(x, torch.zeros_like(x))
    assert_close(found / 2, activated)


# ---------------------------------------------------------------------------------------------------------- the model


def test_each_separable_cell_and_each_shift_cell_is_one_function(tiny_config: Callable[..., NVAEConfig]) -> None:
    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    model = NVAE(tiny_config(scales=2, flows=1, decoder_cells=2)).eval().for_inference()
    features, noise = model.encode(torch.rand(2, 3, 8, 8)), [torch.randn(shape) for shape in model.latent_shapes(2)]
    found: list[str] = []
    with Count():
        model.decode(features, noise)
    groups = len(model.groups)
    cells = 2 * (groups - 1) + 1 + 1  # of all groups but the first, between the scales, post-processing
    assert sum("inference_bottleneck" in name for name in found) == cells + 2 * groups
    # The first group has no prior and no merge; enlarging cells have a convolution in their skips; then the head.
    assert sum("aten.convolution" in name for name in found) == 3 * (groups - 1) + 2 + 2 + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_compiled_it_says_the_same(tiny_config: Callable[..., NVAEConfig], backend: str) -> None:
    model = NVAE(tiny_config(flows=1)).eval().for_inference()
    images, noise = torch.rand(2, 3, 8, 8), [torch.randn(shape) for shape in model.latent_shapes(2)]
    expected = model(images, noise).log_weight
    whole = torch.compile(model, backend=backend)
    assert_close(whole(images, noise).log_weight, expected, error=1e-5)


def test_with_gradients_or_in_float64_pytorch_does_it(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = NVAE(tiny_config(flows=1)).eval()
    images, noise = torch.rand(2, 3, 8, 8), [torch.randn(shape) for shape in model.latent_shapes(2)]
    expected = model(images, noise).log_weight
    ready = model.for_inference()
    with torch.enable_grad():
        assert_close(ready(images, noise).log_weight, expected, error=1e-5)
    wide = ready.double()(images.double(), [n.double() for n in noise]).log_weight
    assert wide.dtype == torch.float64
    assert_close(wide, expected, error=1e-5)
