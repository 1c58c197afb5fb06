"""Stage 1 as a family: its contract, its losses, and that its bound is one (spec_vqvae §1–§3)."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.models.base import FirstBatch, FirstImages
from nvae.models.nvae.config import NVAEConfig
from nvae.models.vqvae.config import VQVAEConfig
from nvae.models.vqvae.model import VQVAE, QuantisedOutput

SMALL: dict[str, Any] = {
    "family": "vqvae",
    "image_size": 8,
    "image_channels": 3,
    "factors": [2, 2],
    "channels": 8,
    "residual_channels": 4,
    "blocks": 1,
    "quantiser": {"codes": 5, "dim": 4},
    "likelihood": {"components": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "one level, mixture": {"factors": [4]},
    "two levels, mixture": {},
    "three levels, Bernoulli": {"factors": [2, 2, 2], "image_channels": 1, "likelihood": {"kind": "bernoulli"}},
    "two levels, squared error": {"likelihood": {"kind": "squared_error"}, "variance": 0.3},
    "codes by gradient": {"quantiser": {"codes": 5, "dim": 4, "learning": "gradient", "start": "uniform"}},
    "rotation": {"quantiser": {"codes": 5, "dim": 4, "gradient": "rotation", "averages": "from_one"}},
}


def config(**changes: Any) -> VQVAEConfig:
    return validate(VQVAEConfig, {**SMALL, **changes}, "tiny")


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> VQVAE:
    return VQVAE(config(**request.param)).eval()


def images(model: VQVAE, batch: int = 3, *, seed: int = 0) -> Tensor:
    c = model.config
    levels = 1 if c.likelihood.kind == "bernoulli" else 255
    shape = (batch, c.image_channels, c.image_size, c.image_size)
    return torch.randint(levels + 1, shape, generator=torch.Generator().manual_seed(seed)) / levels


def first_images(x: Tensor) -> FirstImages:
    batch = FirstBatch(x, torch.full((len(x),), -1), lambda: [])
    return FirstImages([batch], len(x), seed=0)


# -------------------------------------------------------------------------------------------------------- the contract


def test_its_output_has_the_shapes_of_the_contract(model: VQVAE) -> None:
    output = model(images(model))
    shapes = model.latent_shapes(3)
    assert [tuple(z.shape) for z in output.z] == shapes
    assert all(not z.is_floating_point() for z in output.z)
    assert output.kl.shape == (3, len(shapes))
    assert output.reconstruction.shape == (3,)


def test_rate_is_that_of_uniform_codes_and_the_bound_their_sum_with_the_distortion(model: VQVAE) -> None:
    output = model(images(model))
    codes = sum(math.prod(shape[1:]) for shape in model.latent_shapes(1))
    torch.testing.assert_close(output.kl.sum(1), torch.full((3,), codes * math.log(5)))
    torch.testing.assert_close(output.log_weight, -output.kl.sum(1) - output.reconstruction)


def test_a_code_has_no_draws_so_that_repetition_changes_nothing(model: VQVAE) -> None:
    features = model.encode(images(model))
    once, twice = model.decode(features), model.decode(features.repeated(2))
    for z, again in zip(once.z, twice.z, strict=True):
        assert torch.equal(torch.cat([z, z]), again)
    torch.testing.assert_close(once.reconstruction.repeat(2), twice.reconstruction)
    assert model.density == ("none" if model.config.likelihood.kind == "squared_error" else "point")


def test_given_codes_are_taken_and_decode_as_they_sample(model: VQVAE) -> None:
    latents = [torch.randint(5, shape) for shape in model.latent_shapes(3)]
    output = model.decode(model.encode(images(model)), latents=latents)
    for z, given in zip(output.z, latents, strict=True):
        assert torch.equal(z, given)
    torch.testing.assert_close(output.likelihood.params, model.sample(3, latents=latents).params)


def test_with_the_top_given_the_levels_below_follow_it() -> None:
    model = VQVAE(config()).eval()
    features = model.encode(images(model, 8))
    free = model.decode(features)
    given = (free.z[0] + 1) % 5
    output = model.decode(features, latents=[given])
    assert isinstance(free, QuantisedOutput) and isinstance(output, QuantisedOutput)
    assert torch.equal(output.z[0], given)
    assert free.quantised[1].commitment != output.quantised[1].commitment


@pytest.mark.parametrize("wrong", [torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 5), torch.full((3, 1, 2, 2), -1)])
def test_what_is_no_code_is_refused(wrong: Tensor) -> None:
    model = VQVAE(config()).eval()
    with pytest.raises(UserError, match="group 0 takes indices of codes, whole numbers from 0 to 4"):
        model.decode(model.encode(images(model)), latents=[wrong])


def test_samples_follow_their_noise_and_at_temperature_0_nothing(model: VQVAE) -> None:
    noise = [torch.randn(shape) for shape in model.latent_shapes(3)]
    assert torch.equal(model.sample(3, noise=noise).params, model.sample(3, noise=noise).params)
    other = [-epsilon for epsilon in noise]
    assert not torch.equal(model.sample(3, noise=noise).params, model.sample(3, noise=other).params)
    assert torch.equal(model.sample(3, 0.0, noise=noise).params, model.sample(3, 0.0, noise=other).params)


def test_labels_are_refused(model: VQVAE) -> None:
    with pytest.raises(UserError, match="takes none"):
        model(images(model), labels=torch.zeros(3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------------- losses


def test_the_loss_is_distortion_per_dimension_and_the_commitments(model: VQVAE) -> None:
    output = model.train()(images(model))
    assert isinstance(output, QuantisedOutput)
    loss, metrics = model.loss(output, 0.5)
    dims = 8 * 8 * model.config.image_channels
    commitment = sum(quantised.commitment for quantised in output.quantised)
    codebooks = sum(quantised.codebook for quantised in output.quantised)
    distortion = output.reconstruction.mean() / dims / model.config.variance
    torch.testing.assert_close(loss, distortion + 0.25 * commitment + codebooks)
    torch.testing.assert_close(metrics["commitment"], commitment.detach())
    assert ("nelbo" in metrics) == (model.config.likelihood.kind != "squared_error")


def test_the_squared_error_is_the_mean_over_elements_on_the_scale_from_minus_one_to_one() -> None:
    model = VQVAE(config(likelihood={"kind": "squared_error"})).eval()
    x = images(model)
    output = model(x)
    _, metrics = model.loss(output, 0.0)
    expected = (output.likelihood.params - (2 * x - 1)).square().mean()
    torch.testing.assert_close(metrics["squared_error"], expected.detach())
    assert "reconstruction" not in metrics and "nelbo" not in metrics


def test_every_parameter_learns(model: VQVAE) -> None:
    loss, _ = model.train().loss(model(images(model)), 0.0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_recomputation_changes_nothing(model: VQVAE) -> None:
    again = VQVAE(model.config)
    again.load_state_dict(model.state_dict())
    again.set_recomputation("cells")
    for one in (model.train(), again.train()):
        loss, _ = one.loss(one(images(one)), 0.0)
        loss.backward()
        one.after_update(0, 0, 0.0)
    for ours, others in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, others.grad)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


# -------------------------------------------------------------------------------------------------- codebooks in a run


def test_codes_begin_as_vectors_of_the_first_images_and_leave_nothing_to_apply() -> None:
    model = VQVAE(config()).train()
    x = images(model, 16)
    model.begin(first_images(x))
    assert model.after_update(0, 0, 0.0) == {}
    encoded = model.network.encode(2 * x - 1)
    vectors = model.network.top_down()[0].vectors(encoded[0], None).movedim(1, -1).flatten(0, 2)
    for code in model.network.quantisers()[0].codebook:
        assert (vectors - code).abs().sum(1).min() < 1e-5


def test_codes_that_start_otherwise_stay_where_they_are() -> None:
    model = VQVAE(config(quantiser={"codes": 5, "dim": 4, "start": "uniform"})).train()
    before = [quantiser.codebook.clone() for quantiser in model.network.quantisers()]
    model.begin(first_images(images(model)))
    for quantiser, codebook in zip(model.network.quantisers(), before, strict=True):
        assert torch.equal(quantiser.codebook, codebook)


def test_an_update_moves_codebooks_and_says_how_they_are_used() -> None:
    model = VQVAE(config()).train()
    model.begin(first_images(images(model)))
    before = model.network.quantisers()[0].codebook.clone()
    model(images(model, seed=1))
    metrics = model.after_update(0, 0, 0.0)
    assert metrics["perplexity"].shape == metrics["restarts"].shape == (2,)
    assert (metrics["perplexity"] >= 1).all() and (metrics["perplexity"] <= 5).all()
    assert not torch.equal(model.network.quantisers()[0].codebook, before)


def test_a_skipped_update_moves_nothing() -> None:
    model = VQVAE(config()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(images(model))
    model.after_skip()
    assert model.after_update(0, 0, 0.0) == {}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_averages_of_the_weights_copy_codebooks_by_averages_only() -> None:
    copied = VQVAE(config()).copied()
    assert copied and all("quantiser" in name for name in copied)
    assert not VQVAE(config(**KINDS["codes by gradient"])).copied()


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": []}, "at least one level"),
        ({"factors": [3]}, "3 is not a power of 2"),
        ({"factors": [4, 4]}, r"\[4, 4\] do not divide the 8 pixels"),
        ({"classes": 10}, "codes know no classes"),
        ({"variance": 0.1}, "only a squared error is divided"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_a_squared_error_is_for_this_family_only() -> None:
    with pytest.raises(UserError, match="squared_error is no likelihood, which family nvae needs"):
        validate(NVAEConfig, {"family": "nvae", "likelihood": {"kind": "squared_error"}}, "a config")


# ----------------------------------------------------------------------------------------------------- the bound is one


@torch.no_grad()
def test_the_bound_bounds_a_likelihood_that_sums_to_one() -> None:
    """2×2 binary images and one code of 3: everything can be counted."""
    model = VQVAE(
        config(image_size=2, image_channels=1, factors=[2], likelihood={"kind": "bernoulli"}, quantiser={"codes": 3})
    ).eval()
    for parameter in model.parameters():
        parameter.mul_(2)
    x = torch.tensor(list(product((0.0, 1.0), repeat=4))).reshape(16, 1, 2, 2)
    bound = model(x).log_weight.double()
    each = [model.sample(16, latents=[torch.full((16, 1, 1, 1), code)]).log_prob(x).double() for code in range(3)]
    likelihood = torch.logsumexp(torch.stack(each), dim=0) - math.log(3)
    assert (bound <= likelihood + 1e-6).all()
    assert float(likelihood.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert float(bound.exp().sum()) < 1
