"""Normal latents in C++ against PyTorch's in float64, on vectors of each width that this processor has."""

from collections.abc import Iterator

import pytest
import torch
from processors import PROCESSORS, compile_for, needs_compiler
from torch import Tensor

from nvae.bricks.latents import Normal, bounded_normal, score_terms
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
    for raws in ((of_prior,), (of_prior, of_state, of_image), (of_prior, of_image.bfloat16())):
        expected = bounded_normal.plain(tuple(raw.double() for raw in raws), 0.7)
        for ours, theirs in zip(kernels.bounded_normal(raws, 0.7), expected, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(20, (16, 16)), (3, (2, 2)), (7, (3, 5)), (1, (1, 1))])
def test_scores_are_pytorchs(channels: int, size: tuple[int, int], closed: bool) -> None:
    raws = [(3 * torch.randn(6, 2 * channels, *size),) for _ in range(2)]
    q, p = (Normal(*kernels.bounded_normal(raw, 0.7)) for raw in raws)
    drawn = q.draw(torch.randn_like(q.mean))
    z = drawn + 0.1 * torch.randn_like(drawn)
    wide = [Normal(each.mean.double(), each.sigma.double()) for each in (q, p)]
    expected = score_terms.plain(*wide, drawn.double(), z.double(), closed)
    for ours, theirs in zip(kernels.score_terms(q, p, drawn, z, closed), expected, strict=True):
        assert_close(ours, theirs)


def test_what_is_not_a_number_stays_visible() -> None:
    raw = torch.randn(1, 2, 8, 8)
    raw[0, 0, 2, 2] = torch.nan
    found = Normal(*kernels.bounded_normal((raw,), 1.0))
    assert bool(found.mean.isnan().any())
    number = Normal(*kernels.bounded_normal((torch.randn(1, 2, 8, 8),), 1.0))
    assert bool(kernels.score_terms(found, number, number.mean, number.mean, True)[0].isnan().any())
    raw[0, :, 2, 2] = torch.nan
    assert bool(kernels.bounded_normal((raw,), 1.0)[1].isnan().any())


def test_float64_and_gradients_are_left_to_pytorch() -> None:
    raw = torch.randn(1, 2, 2, 2)
    assert kernels.bounded_normal((raw,), 1.0) is not NotImplemented
    assert kernels.bounded_normal((raw.double(),), 1.0) is NotImplemented
    assert kernels.bounded_normal((raw,) * (kernels.MOST_TERMS + 1), 1.0) is NotImplemented
    with torch.enable_grad():
        assert kernels.bounded_normal((raw,), 1.0) is NotImplemented
