"""Convolutions and latents in C++ against PyTorch's in float64, on vectors of each width that this processor has."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from processors import PROCESSORS, library_for, needs_compiler, needs_float16
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvae.bricks import bottleneck as inference
from nvae.bricks.bottleneck import Bottleneck, Convolution
from nvae.bricks.convolutions import Conv2d
from nvae.bricks.flows import ShiftCell
from nvae.bricks.squeeze_excite import SqueezeExcite
from nvae.kernels import native
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE

pytestmark = needs_compiler


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is the one for that processor."""
    made = library_for(request.param, inference.SOURCE, monkeypatch)
    monkeypatch.setattr(inference, "_made", lambda: made)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Only then are the C++ functions used."""
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
    assert [len(taps) for taps in bottleneck.constants[3:5]] == [5, 13]  # of 9 and 25


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
    assert bool(Convolution(expand)(z, "elu" if elu else "identity").isnan().any())


def test_a_kernel_of_zeros_and_a_batch_of_none() -> None:
    convolutions = [Conv2d(2, 2, normalised=False), Conv2d(2, 2, 5, groups=2, normalised=False)]
    for convolution in convolutions:
        convolution.weight.zero_()
    bottleneck = Bottleneck(convolutions[0], convolutions[1], convolutions[0])
    x = torch.randn(2, 2, 4, 4)
    bias = convolutions[0].bias
    assert bias is not None
    assert_close(Convolution(convolutions[0])(x), bias[:, None, None].expand_as(x))
    assert_close(bottleneck(x, x), x + bias[:, None, None])
    assert bottleneck(x[:0], x[:0]).shape == (0, 2, 4, 4)


def test_a_model_for_inference_stays_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = Convolution(Conv2d(2, 2))
    x = torch.randn(1, 2, 3, 3)
    assert_close(deepcopy(convolution)(x), convolution(x))
    convolution.made_for = "another"
    with pytest.raises(ValueError, match="belongs to the machine that made it"):
        deepcopy(convolution)


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


# ----------------------------------------------------------------------------------------------------------- float16


def in_bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def separable(inputs: int, hidden: int) -> tuple[Conv2d, Conv2d, Conv2d]:
    """The convolutions of a bottleneck, random."""
    expand, project = Conv2d(inputs, hidden, normalised=False), Conv2d(hidden, inputs, normalised=False)
    return expand, Conv2d(hidden, hidden, 5, groups=hidden, normalised=False), project


@needs_float16
@pytest.mark.parametrize("elu", [False, True])
def test_a_bottleneck_in_float16_errs_less_than_in_bfloat16(elu: bool) -> None:
    expand, spatial, project = separable(40, 240)
    x = torch.randn(2, 40, 16, 16)
    inner, outer = (F.elu, lambda u: F.elu(F.elu(u))) if elu else (F.silu, F.silu)

    def plainly(x: Tensor) -> Tensor:
        return cast(Tensor, project(outer(spatial(inner(expand(x))))))

    with in_bfloat16():
        found = Bottleneck(expand, spatial, project, elu=elu)(x, torch.zeros_like(x))
        in_bf16 = plainly(x)
    for convolution in (expand, spatial, project):
        convolution.double()
    expected = plainly(x.double())
    assert found.dtype == torch.float32
    error = root_mean_square(found - expected)
    assert 0 < error < root_mean_square(in_bf16 - expected) / 2


@needs_float16
def test_long_sums_in_float16_err_less_than_in_bfloat16() -> None:
    convolution, x = Conv2d(128, 40, 3, normalised=False), torch.randn(2, 128, 9, 9)
    with in_bfloat16():
        found, in_bf16 = Convolution(convolution)(x), convolution(x)
    expected = convolution.double()(x.double())
    assert 0 < root_mean_square(found - expected) < root_mean_square(in_bf16 - expected)


@needs_float16
@pytest.mark.parametrize("factor", [1e6, 1e30])
def test_beyond_the_range_of_float16_it_is_float32(factor: float) -> None:
    """Only where it is: the second image stays in float16."""
    expand, spatial, project = separable(8, 48)
    bottleneck, convolution = Bottleneck(expand, spatial, project), Convolution(project)
    x = torch.randn(2, 8, 6, 6)
    hidden = torch.randn(2, 48, 6, 6)
    x[0] *= factor
    hidden[0] *= factor
    expected, convolved = bottleneck(x, x), convolution(hidden)
    with in_bfloat16():
        found, found_convolved = bottleneck(x, x), convolution(hidden)
    for ours, theirs in ((found, expected), (found_convolved, convolved)):
        assert torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[1], theirs[1])
        assert_close(ours[1], theirs[1], error=2**-8)


@needs_float16
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_kernels_that_float16_does_not_suit_stay_in_float32(size: float) -> None:
    convolution = Conv2d(4, 4, normalised=False)
    assert Convolution(convolution).in_float16
    convolution.weight *= size
    assert not Convolution(convolution).in_float16


@needs_float16
@pytest.mark.parametrize("value", [-1e4, -100.0, -20.0, -2.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 2.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("elu", [False, True])
def test_activations_in_float16(value: float, elu: bool) -> None:
    """As `test_activations_far_out`; small negative inputs stay precise relative to themselves."""
    expand, spatial, project = passing_on()
    x = torch.full((1, 1, 2, 2), value)
    u = x.double()
    activated = F.elu(F.elu(F.elu(u))) if elu else F.silu(F.silu(u))
    with in_bfloat16():
        found = Bottleneck(expand, spatial, project, elu=elu)(x, torch.zeros_like(x)) / 2
    assert float((found - activated).abs().max()) <= 2**-8 * float(activated.abs().max()) + 2**-23


# ---------------------------------------------------------------------------------------------- single convolutions


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("activation", inference.IN_CONVOLUTIONS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "dilation"),
    [(8, 40, (16, 16), 1, 1), (3, 7, (9, 11), 3, 1), (4, 16, (6, 5), 3, 2), (64, 100, (200, 130), 3, 1)],
)
def test_a_convolution_is_pytorchs(
    inputs: int, outputs: int, size: tuple[int, int], kernel: int, dilation: int, activation: Any
) -> None:
    convolution = Conv2d(inputs, outputs, kernel, dilation=dilation)
    ours = Convolution(convolution)
    x = torch.randn(2, inputs, *size)
    expected = convolution.double()(x.double(), activation)
    # Up to 576 products, summed one after the other: rounding walks √576 steps of 2⁻²⁴ at sums of this size.
    assert_close(ours(x, activation), expected, error=3e-6)
    assert_close(ours(x.bfloat16(), activation), expected, error=2**-6)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_two_tensors_is_that_of_both_side_by_side(kernel: int, bfloat16: bool) -> None:
    convolution = Convolution(Conv2d(27, 20, kernel))
    x, other = torch.randn(2, 7, 5, 6), torch.randn(2, 20, 5, 6)
    if bfloat16:
        x, other = x.bfloat16(), other.bfloat16()
    both = torch.cat([x, other], dim=1)
    assert torch.equal(convolution(x, "elu", other=other), convolution(both, "elu"))
    with torch.enable_grad():
        assert_close(convolution(x, "elu", other=other).detach(), convolution(both, "elu").detach())


# ---------------------------------------------------------------------------------------------------------- the model


def test_decoding_and_sampling_call_no_other_convolution(tiny_config: Callable[..., NVAEConfig]) -> None:
    """Each separable cell, each shift cell, and each convolution outside of them, is one function."""

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    model = NVAE(tiny_config(scales=2, flows=1, decoder_cells=2)).eval().for_inference()
    features, noise = model.encode(torch.rand(2, 3, 8, 8)), [torch.randn(shape) for shape in model.latent_shapes(2)]
    found: list[str] = []
    with Count():
        model.decode(features, noise)
    assert not any("aten.convolution" in name or "aten.addmm" in name for name in found)
    groups = len(model.groups)
    cells = 2 * (groups - 1) + 1 + 1  # of all groups but the first, between the scales, post-processing
    assert sum("inference_bottleneck" in name for name in found) == cells + 2 * groups
    # The first group has no prior and no merge; enlarging cells have a convolution in their skips; then the head.
    assert sum("inference_convolution" in name for name in found) == 3 * (groups - 1) + 2 + 2 + 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
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


# --------------------------------------------------------------------------------------------------------- the library


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiles", lambda kind: False)
    assert native.library.__wrapped__(inference.SOURCE) is None


def test_a_source_that_does_not_compile_is_said_once_and_done_without(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    with pytest.warns(UserWarning, match=r"broken.cpp is not used.*"):
        assert native.library.__wrapped__(source) is None


def test_a_library_is_kept_where_it_can_be_and_made_again_where_it_is_damaged(tmp_path: Any, monkeypatch: Any) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    for _ in range(2):
        assert native.library.__wrapped__(source).answer() == 42
    folder = native.cache_folder()
    assert folder is not None
    (kept,) = folder.iterdir()
    start = kept.read_bytes()[:100]
    kept.unlink()  # it is loaded
    kept.write_bytes(start)
    assert native.library.__wrapped__(source).answer() == 42
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    assert native.library.__wrapped__(source).answer() == 42
