"""Normal latents in C++ against PyTorch's in float64, on vectors of each width that this processor has."""

from collections.abc import Iterator

import pytest
import torch
from processors import PROCESSORS, compile_for, needs_compiler
from torch import Tensor

from nvae.bricks import bottleneck as inference
from nvae.bricks import latents
from nvae.bricks.latents import Normal
from nvae.kernels.cpu import latents as kernels

pytestmark = needs_compiler


@pytest.fixture(params=PROCESSORS, autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is the one for that processor."""
    compile_for(request.param, kernels, monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Only then are the C++ functions used."""
    with torch.no_grad():
        yield


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To an error relative to the largest value, or to 1."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 1e-6 * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize(("channels", "size"), [(20, (16, 16)), (3, (2, 2)), (7, (3, 5)), (1, (1, 1))])
def test_normals_are_pytorchs(channels: int, size: tuple[int, int]) -> None:
    of_prior, of_state = (3 * torch.randn(6, 2 * channels, *size) for _ in range(2))
    of_image = torch.randn(2, 2 * channels, *size)
    for raws in ([of_prior], [of_prior, of_state, of_image], [of_prior, of_image.bfloat16()]):
        assert kernels.takes_raw(raws)
        found = inference.normal(raws, 0.7)
        expected = Normal.from_sum([raw.double() for raw in raws], 0.7)
        assert_close(found.mean, expected.mean)
        assert_close(found.sigma, expected.sigma)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(20, (16, 16)), (3, (2, 2)), (7, (3, 5)), (1, (1, 1))])
def test_scores_are_pytorchs(channels: int, size: tuple[int, int], closed: bool) -> None:
    q, p = (inference.normal([3 * torch.randn(6, 2 * channels, *size)], 0.7) for _ in range(2))
    drawn = q.draw(torch.randn_like(q.mean))
    z = drawn + 0.1 * torch.randn_like(drawn)
    assert kernels.takes(q.mean, q.sigma, p.mean, p.sigma, drawn, z)
    wide = [Normal(each.mean.double(), each.sigma.double()) for each in (q, p)]
    found = inference.score(q, p, drawn, z, closed=closed)
    expected = latents.score(*wide, drawn.double(), z.double(), closed=closed)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_what_is_not_a_number_stays_visible() -> None:
    raw = torch.randn(1, 2, 8, 8)
    raw[0, 0, 2, 2] = torch.nan
    found = inference.normal([raw])
    assert bool(found.mean.isnan().any())
    number = inference.normal([torch.randn(1, 2, 8, 8)])
    assert bool(inference.score(found, number, number.mean, number.mean, closed=True).channel_kl.isnan().any())
    raw[0, :, 2, 2] = torch.nan
    assert bool(inference.normal([raw]).sigma.isnan().any())


def test_float64_and_gradients_are_left_to_pytorch() -> None:
    raw = torch.randn(1, 2, 2, 2)
    assert kernels.takes_raw([raw])
    assert not kernels.takes_raw([raw.double()])
    assert not kernels.takes_raw([raw] * (kernels.MOST_TERMS + 1))
    with torch.enable_grad():
        assert not kernels.takes_raw([raw])
