"""Latents in C++ against their formulas in float64, on vectors of each width that this processor has."""

from collections.abc import Iterator

import pytest
import torch
from processors import PROCESSORS, library_for, needs_compiler
from torch import Tensor

from nvae.bricks.latents import Normal, bounded_normal, score_terms
from nvae.kernels.cpu import latents

pytestmark = needs_compiler


@pytest.fixture(params=PROCESSORS, autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is the one for that processor."""
    made = library_for(request.param, latents.SOURCE, monkeypatch)
    monkeypatch.setattr(latents, "made_from", lambda source: made)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Only then are the C++ functions used."""
    with torch.no_grad():
        yield


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-6 of the largest value, or of 1."""
    assert float((ours.double() - theirs.double()).abs().max()) <= 1e-6 * max(float(theirs.abs().max()), 1.0)


@pytest.mark.parametrize(("channels", "size"), [(20, (16, 16)), (3, (2, 2)), (7, (3, 5)), (1, (1, 1))])
def test_distributions_and_scores_are_those_of_float64(channels: int, size: tuple[int, int]) -> None:
    of_prior, of_state = (3 * torch.randn(6, 2 * channels, *size) for _ in range(2))
    of_image = torch.randn(2, 2 * channels, *size)
    for raws in ((of_prior,), (of_prior, of_state, of_image), (of_prior, of_image.bfloat16())):
        expected = bounded_normal.plain(tuple(raw.double() for raw in raws), 0.7)
        for ours, theirs in zip(latents.bounded_normal(raws, 0.7), expected, strict=True):
            assert_close(ours, theirs)
    q, p = (Normal(*latents.bounded_normal(raws, 1.0)) for raws in ((of_prior, of_image), (of_prior,)))
    drawn = q.draw(torch.randn_like(q.mean))
    z = drawn + 0.1 * torch.randn_like(drawn)
    wide = [Normal(each.mean.double(), each.sigma.double()) for each in (q, p)]
    for closed in (False, True):
        expected = score_terms.plain(*wide, drawn.double(), z.double(), closed)
        for ours, theirs in zip(latents.score_terms(q, p, drawn, z, closed), expected, strict=True):
            assert_close(ours, theirs)


def test_what_is_not_a_number_stays_visible() -> None:
    raw = torch.randn(1, 2, 8, 8)
    raw[0, 0, 2, 2] = torch.nan
    found = Normal(*latents.bounded_normal((raw,), 1.0))
    assert bool(found.mean.isnan().any())
    raw[0, :, 2, 2] = torch.nan
    assert bool(latents.bounded_normal((raw,), 1.0)[1].isnan().any())
    number = Normal(*latents.bounded_normal((torch.randn(1, 2, 8, 8),), 1.0))
    assert bool(latents.score_terms(found, number, number.mean, number.mean, True)[0].isnan().any())


def test_gradients_and_other_types_are_left_to_the_plain_functions() -> None:
    raw = torch.randn(1, 2, 4, 4)
    assert latents.bounded_normal((raw.double(),), 1.0) is NotImplemented
    with torch.enable_grad():
        assert latents.bounded_normal((raw,), 1.0) is NotImplemented
