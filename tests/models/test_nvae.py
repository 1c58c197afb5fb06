"""The hierarchy: geometry, the contract of a family, posteriors, precision, the start from data."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from first_images import first_images, never_read
from torch import Tensor, nn

from nvae.bricks.cells import RegularOp
from nvae.bricks.flows import ShiftCell
from nvae.bricks.groups import LatentGroup
from nvae.bricks.latents import Normal, importance_weighted_bound, kl_divergence, score
from nvae.bricks.likelihoods import LIKELIHOODS, quantise
from nvae.bricks.normalisation import BatchNorm, measuring
from nvae.core.errors import UserError
from nvae.models.base import Noise, Output
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.objective import balance_factors, balance_weights, balanced_kl

Make = Callable[..., NVAEConfig]


def images(config: NVAEConfig, n: int = 3) -> Tensor:
    """Binary images or ones of 256 levels, in [0, 1]."""
    shape = (n, config.image_channels, config.image_size, config.image_size)
    return torch.randint(2, shape).float() if config.likelihood.kind == "bernoulli" else torch.randint(256, shape) / 255


def noise_for(model: NVAE, n: int = 3) -> Noise:
    return [torch.randn(shape) for shape in model.latent_shapes(n)]


def lively(config: NVAEConfig) -> NVAE:
    """A model in eval mode whose posterior, prior and flow depend on the image, unlike those of a fresh one."""
    model = NVAE(config)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for module in model.modules():
        if isinstance(module, ShiftCell):
            module.project.log_gain.data += 2
        elif isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad(), measuring(norms):
        model.train()(images(config, 8))
    return model.eval()


def assert_same(ours: Output, theirs: Output, rtol: float = 0.0, atol: float = 0.0) -> None:
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(ours.likelihood.params, theirs.likelihood.params, **close)
    torch.testing.assert_close(ours.kl, theirs.kl, **close)
    torch.testing.assert_close(ours.log_q, theirs.log_q, **close)
    torch.testing.assert_close(ours.log_p, theirs.log_p, **close)
    for z, expected in zip(ours.z, theirs.z, strict=True):
        torch.testing.assert_close(z, expected, **close)


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("scales", "groups", "adaptive", "least", "expected"),
    [
        (1, 30, False, 1, [30]),
        (2, 10, True, 1, [10, 5]),
        (3, 20, True, 1, [20, 10, 5]),
        (5, 16, True, 4, [16, 8, 4, 4, 4]),
        (4, 5, True, 1, [5, 2, 1, 1]),
        (3, 4, False, 1, [4, 4, 4]),
    ],
)
def test_groups_per_scale(
    tiny_config: Make, scales: int, groups: int, adaptive: bool, least: int, expected: list[int]
) -> None:
    config = tiny_config(image_size=64, scales=scales, groups=groups, adaptive_groups=adaptive, min_groups=least)
    assert config.groups_per_scale == expected


def test_latents_are_listed_from_the_smallest_resolution(tiny_config: Make) -> None:
    model = NVAE(tiny_config(image_size=16, scales=3, groups=3, adaptive_groups=True, latent_channels=5))
    sides = [2, 4, 8, 8, 8]
    assert model.latent_shapes(7) == [(7, 5, side, side) for side in sides]


def test_without_halvings_the_latents_are_as_large_as_the_image(tiny_config: Make) -> None:
    model = NVAE(tiny_config(halvings=0))
    assert model.latent_shapes(1)[-1][-1] == 8
    model(images(model.config))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"image_size": 12, "scales": 3},
            "image_size: 12 pixels can be halved 2 times; halvings=1 and scales=3 need 3 (a multiple of 8 pixels)",
        ),
        (
            {"image_size": 8, "halvings": 5},
            "image_size: 8 pixels can be halved 3 times; halvings=5 and scales=1 need 5",
        ),
        ({"likelihood": {"border": 4}}, "likelihood.border: 4 leaves nothing of 8 pixels"),
        ({"likelihood": {"kind": "bernoulli"}}, "likelihood.kind: bernoulli is for one-channel images"),
        ({"likelihood": {"kind": "normal"}, "image_channels": 1}, "likelihood.kind: normal is for RGB images"),
        ({"architecture": "res_mbcnv"}, "architecture: no 'res_mbcnv'; did you mean 'res_mbconv'?"),
        (
            {"architecture": "mbconv_den", "encoder_channels": 12, "decoder_channels": 16},
            "encoder_channels: mbconv_den convolves in 8 groups, so a multiple of 8 is needed, found 12",
        ),
        (
            {"architecture": "mbconv_den", "encoder_channels": 16, "decoder_channels": 4},
            "decoder_channels: mbconv_den convolves in 8 groups, so a multiple of 8 is needed, found 4",
        ),
        ({"groups": 0}, "groups: input should be greater than or equal to 1, found 0"),
        ({"image_channels": 2}, "image_channels: input should be 1 or 3, found 2"),
    ],
)
def test_impossible_geometry_is_a_sentence(tiny_config: Make, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_config(**changes)
    assert sentence in str(error.value)


def test_grouped_convolutions_fit_their_multiples(tiny_config: Make) -> None:
    model = NVAE(tiny_config(architecture="mbconv_den", encoder_channels=8, decoder_channels=16, preprocess_cells=2))
    model(images(model.config))


def test_the_vanilla_model_has_no_towers_and_an_unused_map(tiny_config: Make) -> None:
    model = NVAE(tiny_config(groups=1))
    group = model.groups[0]
    assert isinstance(group, LatentGroup)
    assert len(group.encoder_cells) == len(group.decoder_cells) == 0
    assert group.combine.weight.shape[1] == 3, "of z alone"
    before = model.eval().sample(2, noise=(noise := noise_for(model, 2))).params
    model.first_state.data += 1
    assert torch.equal(model.sample(2, noise=noise).params, before)
    assert "first_state" in dict(model.named_parameters())
    assert not model.first_state.requires_grad


def test_two_scales_of_one_group_are_not_vanilla(tiny_config: Make) -> None:
    assert not tiny_config(groups=1, scales=2).is_vanilla


def test_channels_double_with_every_halving(tiny_config: Make) -> None:
    model = NVAE(tiny_config(image_size=16, scales=2, halvings=2, encoder_channels=4, decoder_channels=6))
    widths = [(group.posterior.weight.shape[1], group.combine.weight.shape[0]) for group in model.groups]
    assert widths == [(32, 48)] * 2 + [(16, 24)] * 2


# --------------------------------------------------------------------------------------------------------- contract


def test_an_output_has_the_shapes_of_the_contract(any_config: NVAEConfig) -> None:
    model = NVAE(any_config)
    output = model(images(any_config))
    groups, shapes = sum(any_config.groups_per_scale), model.latent_shapes(3)
    assert output.kl.shape == (3, groups)
    assert output.log_q.shape == output.log_p.shape == output.log_weight.shape == output.reconstruction.shape == (3,)
    assert [z.shape for z in output.z] == shapes
    assert [q.mean.shape for q in output.posterior] == [p.sigma.shape for p in output.prior] == shapes
    assert output.likelihood.mean().shape == output.target.shape == images(any_config).shape


def test_the_gradient_of_the_loss_reaches_every_parameter(any_config: NVAEConfig) -> None:
    model = NVAE(any_config)
    loss, _ = model.loss(model(images(any_config)), 0.1)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_noise_decides_a_pass(any_config: NVAEConfig) -> None:
    model, x = lively(any_config), images(any_config)
    noise = noise_for(model)
    with torch.no_grad():
        assert_same(model(x, noise), model(x, noise))
        assert not torch.equal(model(x, noise).z[0], model(x).z[0])


def test_encoding_once_and_decoding_twice_is_two_passes(any_config: NVAEConfig) -> None:
    model, x = lively(any_config), images(any_config)
    with torch.no_grad():
        features = model.encode(x)
        for noise in (noise_for(model), noise_for(model)):
            assert_same(model.decode(features, noise), model(x, noise))


@pytest.mark.parametrize("inference", [False, True], ids=["as it trains", "for inference"])
def test_repeated_features_are_draws_of_each_image(any_config: NVAEConfig, inference: bool) -> None:
    model, x = lively(any_config), images(any_config, 2)
    noise = noise_for(model, 6)
    decoder = model.for_inference() if inference else model
    with torch.no_grad():
        features = decoder.encode(x)
        assert features.repeated(3).taps is features.taps
        many = decoder.decode(features.repeated(3), noise)
        for k in range(3):
            one = model(x, [n[2 * k : 2 * k + 2] for n in noise])
            torch.testing.assert_close(many.log_weight.reshape(3, 2)[k], one.log_weight, rtol=1e-5, atol=1e-3)


def test_an_evaluation_changes_nothing(any_config: NVAEConfig) -> None:
    model = lively(any_config)
    state = copy.deepcopy(model.state_dict())
    model(images(any_config))
    model.sample(2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_training_pass_advances_every_batch_norm_once(any_config: NVAEConfig) -> None:
    model = NVAE(any_config)
    model(images(any_config))
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, BatchNorm)} <= {1}


def test_images_are_quantised_before_the_network_sees_them(tiny_config: Make) -> None:
    config = tiny_config(likelihood={"bits": 5, "components": 1})
    model, x = lively(config), images(config)
    noise = noise_for(model)
    with torch.no_grad():
        assert_same(model(x, noise), model(quantise(x, 5), noise))
    assert torch.equal(model(x, noise).target, quantise(x, 5))


def test_the_target_lies_on_the_grid_of_the_likelihood(tiny_config: Make) -> None:
    config = tiny_config(likelihood={"bits": 5, "grid": "truncated"})
    x = images(config)
    assert torch.equal(NVAE(config)(x).target, quantise(x, 5, "truncated"))


# ---------------------------------------------------------------------------------------------------------- latents


def test_given_latents_reproduce_the_pass(any_config: NVAEConfig) -> None:
    """Also log q with flows, which is that of the draw before them."""
    model, x = lively(any_config).double(), images(any_config).double()
    noise = [n.double() for n in noise_for(model)]
    with torch.no_grad():
        output = model(x, noise)
        again = model.decode(model.encode(x), noise=None, latents=output.z)
    assert_same(again, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_prefix_of_latents_may_be_given(tiny_config: Make, known: int) -> None:
    model = lively(tiny_config(groups=3, flows=2)).double()
    x = images(model.config).double()
    noise = [n.double() for n in noise_for(model)]
    with torch.no_grad():
        output = model(x, noise)
        other = [torch.full_like(n, torch.nan) if g < known else n for g, n in enumerate(noise)]
        again = model.decode(model.encode(x), noise=other, latents=output.z[:known])
    assert_same(again, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [0, 1, 2, 3])
def test_samples_may_start_from_given_latents(tiny_config: Make, known: int) -> None:
    """Those of the draw itself reproduce it."""
    model = lively(tiny_config(groups=3))
    noise = noise_for(model)
    with torch.no_grad():
        expected = model.sample(3, 0.8, noise).params
        latents = prior_draw(model, noise, 0.8)
        other = [torch.full_like(n, torch.nan) if g < known else n for g, n in enumerate(noise)]
        found = model.sample(3, 0.8, other, latents=latents[:known]).params
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def prior_draw(model: NVAE, noise: Noise, temperature: float) -> list[Tensor]:
    """The latents of a draw from the prior, by the words of spec §2: a group at a time."""
    state, latents = model.first_state.expand(noise[0].shape[0], -1, -1, -1), []
    for group, epsilon in zip(model.groups, noise, strict=True):
        assert isinstance(group, LatentGroup)
        state = group.decoder_cells(state)
        raw = torch.zeros_like(epsilon).repeat(1, 2, 1, 1)
        if not group.is_first:
            raw = group.prior(nn.functional.elu(state))
        mean, log_sigma = (5 * torch.tanh(raw / 5)).chunk(2, 1)
        latents.append(mean + temperature * (log_sigma.exp() + 0.01) * epsilon)
        state = group.combine(torch.cat([state, latents[-1]], 1))
    return latents


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda noise: noise[:1], "noise: 1 tensors for 2 latent groups"),
        (lambda noise: [*noise, noise[0]], "noise: 3 tensors for 2 latent groups"),
        (lambda noise: [n[:1] for n in noise], "noise: group 0 takes (3, 3, 4, 4), found (1, 3, 4, 4)"),
    ],
)
def test_noise_of_another_shape_is_refused(tiny_config: Make, change: Any, sentence: str) -> None:
    model = NVAE(tiny_config())
    noise = change(noise_for(model))
    for call in (lambda: model(images(model.config), noise), lambda: model.sample(3, noise=noise)):
        with pytest.raises(UserError) as error:
            call()
        assert sentence in str(error.value)


def test_latents_of_another_shape_are_refused(tiny_config: Make) -> None:
    model = NVAE(tiny_config())
    with pytest.raises(UserError, match=r"latents: group 0 takes \(3, 3, 4, 4\), found \(2, 3, 4, 4\)"):
        model.sample(3, latents=[torch.zeros(2, 3, 4, 4)])
    with pytest.raises(UserError, match="latents: 5 tensors for 2 latent groups"):
        model.sample(3, latents=[torch.zeros(3, 3, 4, 4)] * 5)


# ------------------------------------------------------------------------------------------------- group by group


def same(ours: Normal, theirs: Normal) -> bool:
    return torch.equal(ours.mean, theirs.mean) and torch.equal(ours.sigma, theirs.sigma)


@pytest.mark.parametrize("inference", [False, True], ids=["as it trains", "for inference"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_stepping_through_the_groups_is_decoding(
    any_config: NVAEConfig, inference: bool, precision: torch.dtype
) -> None:
    """Bit for bit: priors, posteriors, latents and the likelihood's parameters."""
    model, x = lively(any_config), images(any_config)
    model, noise = model.for_inference() if inference else model, noise_for(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        features = model.encode(x)
        output = model.decode(features, noise)
        groups = model.top_down(features)
        for g, epsilon in enumerate(noise):
            posterior, prior = groups.posterior(), groups.prior()
            assert same(prior, output.prior[g]) and same(posterior, output.posterior[g])
            z = groups.flowed(posterior.draw(epsilon))
            assert torch.equal(z, output.z[g])
            groups.enter(z)
        assert torch.equal(groups.likelihood().params, output.likelihood.params)


def test_stepping_without_features_is_sampling(any_config: NVAEConfig) -> None:
    model = lively(any_config)
    noise = noise_for(model)
    with torch.no_grad():
        groups = model.top_down(n=3)
        for epsilon in noise:
            groups.enter(groups.prior(0.8).draw(epsilon))
        assert torch.equal(groups.likelihood().params, model.sample(3, 0.8, noise).params)


def test_the_priors_of_given_latents_are_the_same_with_features_and_without(any_config: NVAEConfig) -> None:
    """So that what one side encodes by them the other decodes."""
    model, x = lively(any_config), images(any_config)
    with torch.no_grad():
        output = model(x, noise_for(model))
        groups = model.top_down(n=3)
        for z, prior in zip(output.z, output.prior, strict=True):
            assert same(groups.prior(), prior)
            groups.enter(z)
        assert torch.equal(groups.likelihood().params, output.likelihood.params)


def test_a_group_may_be_left_without_a_question(tiny_config: Make) -> None:
    model, x = lively(tiny_config(scales=2)), images(tiny_config())
    with torch.no_grad():
        output = model(x, noise_for(model))
        groups = model.top_down(model.encode(x))
        for z in output.z:
            groups.enter(z)
        assert torch.equal(groups.likelihood().params, output.likelihood.params)


# --------------------------------------------------------------------------------------------------------- sampling


def test_samples_have_the_parameters_of_a_likelihood(any_config: NVAEConfig) -> None:
    model = lively(any_config)
    likelihood = model.sample(4)
    assert likelihood.mean().shape == images(any_config, 4).shape
    assert likelihood.sample().shape == images(any_config, 4).shape


def test_one_temperature_is_that_of_every_group(tiny_config: Make) -> None:
    model = lively(tiny_config(groups=3))
    noise = noise_for(model)
    assert torch.equal(model.sample(3, 0.6, noise).params, model.sample(3, [0.6, 0.6, 0.6], noise).params)
    assert not torch.equal(model.sample(3, 0.6, noise).params, model.sample(3, [0.6, 0.6, 1.0], noise).params)


def test_at_temperature_zero_noise_does_not_matter(any_config: NVAEConfig) -> None:
    model = lively(any_config)
    assert torch.equal(model.sample(3, 0, noise_for(model)).params, model.sample(3, 0, noise_for(model)).params)


def test_the_temperature_multiplies_the_sigma_of_the_first_prior(tiny_config: Make) -> None:
    """σ of the first prior is 1.01."""
    model = lively(tiny_config(groups=1))
    noise = noise_for(model)
    expected = model.sample(3, latents=[0.3 * 1.01 * noise[0]]).params
    torch.testing.assert_close(model.sample(3, 0.3, noise).params, expected)


@pytest.mark.parametrize(
    ("temperature", "sentence"),
    [
        ([0.5], "temperature: 1 values for 2 latent groups"),
        ([0.5] * 3, "temperature: 3 values for 2 latent groups"),
        (-0.1, "temperature: must be 0 or more"),
        (float("nan"), "temperature: must be 0 or more"),
        ([0.5, float("inf")], "temperature: must be 0 or more"),
    ],
)
def test_an_impossible_temperature_is_a_sentence(tiny_config: Make, temperature: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        NVAE(tiny_config()).sample(2, temperature)


def test_many_small_draws_are_one_large_draw(any_config: NVAEConfig) -> None:
    model = lively(any_config)
    noise = noise_for(model, 4)
    whole = model.sample(4, 0.9, noise).params
    parts = [model.sample(2, 0.9, [n[rows] for n in noise]).params for rows in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ posteriors and KL


def silence_posteriors(model: NVAE) -> NVAE:
    """The encoder says zero."""
    for group in model.groups:
        assert isinstance(group, LatentGroup)
        nn.init.zeros_(group.posterior.weight)
        assert group.posterior.bias is not None
        nn.init.zeros_(group.posterior.bias)
    return model


def test_a_residual_posterior_of_zero_is_the_prior(tiny_config: Make) -> None:
    model = silence_posteriors(lively(tiny_config(groups=3)))
    assert (model(images(model.config)).kl == 0).all()


def test_a_plain_posterior_of_zero_is_not_the_prior(tiny_config: Make) -> None:
    model = silence_posteriors(lively(tiny_config(groups=3, residual_posterior=False)))
    kl = model(images(model.config)).kl
    assert (kl[:, 0] == 0).all(), "both are raw zeros"
    assert (kl[:, 1:] > 0).all()


def test_raw_parameters_are_summed_before_the_soft_clamp(tiny_config: Make) -> None:
    """A posterior of raw 20 on a prior of raw −17 is one of raw 3."""
    model = NVAE(tiny_config())
    group = model.groups[1]
    assert isinstance(group, LatentGroup)
    for convolution, value in ((group.posterior, 20.0), (group.prior, -17.0)):
        assert convolution.bias is not None
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, value)
    output = model(images(model.config))
    expected = torch.tensor(5.0) * torch.tanh(torch.tensor(3 / 5))
    torch.testing.assert_close(output.posterior[1].mean, expected.expand(3, 3, 4, 4))


def test_the_first_prior_is_a_normal_of_sigma_1_01(any_config: NVAEConfig) -> None:
    prior = NVAE(any_config)(images(any_config)).prior[0]
    assert (prior.mean == 0).all()
    torch.testing.assert_close(prior.sigma, torch.full_like(prior.sigma, 1.01))


def test_without_flows_the_kl_is_that_of_the_normals(tiny_config: Make) -> None:
    model = lively(tiny_config(scales=2))
    output = model(images(model.config))
    for g, (q, p) in enumerate(zip(output.posterior, output.prior, strict=True)):
        torch.testing.assert_close(output.kl[:, g], kl_divergence(q, p).sum((1, 2, 3)))


def test_with_flows_the_kl_is_the_log_ratio_at_the_draw(tiny_config: Make) -> None:
    model = lively(tiny_config(scales=2, flows=2))
    output = model(images(model.config))
    torch.testing.assert_close(output.kl.sum(1), output.log_q - output.log_p, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("flows", [0, 1])
def test_log_q_is_the_density_of_the_draws_before_the_flow(tiny_config: Make, flows: int) -> None:
    model, x = lively(tiny_config(flows=flows)), images(tiny_config())
    noise = noise_for(model)
    output = model(x, noise)
    log_q = sum(q.log_prob(q.draw(n)).sum((1, 2, 3)) for q, n in zip(output.posterior, noise, strict=True))
    log_p = sum(p.log_prob(z).sum((1, 2, 3)) for p, z in zip(output.prior, output.z, strict=True))
    torch.testing.assert_close(output.log_q, log_q)
    torch.testing.assert_close(output.log_p, log_p)


def test_the_kl_is_the_log_ratio_in_expectation(tiny_config: Make) -> None:
    """Over the draws of all groups: E[Σ KL] = E[log q − log p]."""
    model = lively(tiny_config(scales=2))
    with torch.no_grad():
        output = model.decode(model.encode(images(model.config, 1)).repeated(4000))
    difference = output.kl.sum(1) - (output.log_q - output.log_p)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 4000**0.5


def test_the_kl_of_channels_adds_up(any_config: NVAEConfig) -> None:
    output = lively(any_config)(images(any_config))
    for g, channels in enumerate(output.channel_kl):
        assert channels.shape == (3, any_config.latent_channels)
        torch.testing.assert_close(channels.sum(1), output.kl[:, g])


def test_the_log_weight_is_the_likelihood_and_the_ratio(any_config: NVAEConfig) -> None:
    output = lively(any_config)(x := images(any_config))
    expected = output.likelihood.log_prob(x) + output.log_p - output.log_q
    torch.testing.assert_close(output.log_weight, expected)


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_that_of_the_spec(tiny_config: Make) -> None:
    config = tiny_config(scales=2, adaptive_groups=True, objective={"spectral": 0.1, "spectral_start": 1.0})
    model = NVAE(config)
    output = model(images(config))
    loss, metrics = model.loss(output, 0.1)
    c = (0.1 - 0.0001) / 0.3
    weights = balance_weights(output.kl, balance_factors([0, 1, 1], output.kl.device))
    spectral = sum(float(torch.linalg.svdvals(m.detach())[:, 0].sum()) for m in model.weights.matrices.values())
    scales = sum(float(m.weight.detach().abs().max()) for m in model.modules() if isinstance(m, BatchNorm))
    bound = float((output.reconstruction + balanced_kl(output.kl, c, weights)).mean().detach())
    expected = bound + 0.1**c * (spectral + scales)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    assert float(metrics["nelbo"]) == pytest.approx(float((output.reconstruction + output.kl.sum(1)).mean()))
    assert float(metrics["spectral_weight"]) == pytest.approx(0.1**c)
    assert float(metrics["kl_coefficient"]) == pytest.approx(c)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_at_the_end_the_loss_without_penalties_is_the_bound(any_config: NVAEConfig) -> None:
    objective = any_config.objective.model_copy(update={"spectral": 0.0})
    model = NVAE(any_config.model_copy(update={"objective": objective}))
    output = model(images(any_config))
    loss, metrics = model.loss(output, 1.0)
    torch.testing.assert_close(loss, (output.reconstruction + output.kl.sum(1)).mean())
    assert torch.equal(metrics["nelbo"], loss)


def drawing(config: NVAEConfig, draws: int) -> NVAE:
    """A model that is trained on the importance-weighted bound of so many draws, without penalties."""
    objective = config.objective.model_copy(update={"spectral": 0.0, "importance_samples": draws})
    return NVAE(config.model_copy(update={"objective": objective}))


def test_of_several_draws_the_loss_is_the_bound_that_is_evaluated(tiny_config: Make) -> None:
    model = drawing(tiny_config(flows=1), draws=4)
    output = model(images(model.config))
    bound = importance_weighted_bound(output.log_weight.reshape(4, 3))
    torch.testing.assert_close(model.loss(output, 1.0)[0], -bound.mean())


@pytest.mark.parametrize("progress", [0.1, 1.0])
def test_until_the_kl_has_its_full_weight_several_draws_are_trained_as_single_ones(
    tiny_config: Make, progress: float
) -> None:
    model = drawing(tiny_config(scales=2), draws=2)
    output = model(images(model.config))
    single = drawing(model.config, draws=1).loss(output, progress)[0]
    assert torch.equal(model.loss(output, progress)[0], single) == (progress < 0.3)


def test_a_loss_that_is_recorded_changes_after_the_warm_up_as_any_other(tiny_config: Make) -> None:
    model = drawing(tiny_config(scales=2), draws=2)
    output = model(images(model.config))
    for progress in (0.1, 1.0):
        recorded = model.loss(output, torch.tensor(progress, dtype=torch.float64))[0]
        torch.testing.assert_close(recorded, model.loss(output, progress)[0], check_dtype=False)


def test_several_draws_of_an_image_are_what_single_passes_make_of_their_noise(tiny_config: Make) -> None:
    model, x = drawing(tiny_config(architecture="res_elu"), draws=2), images(tiny_config())
    noise = noise_for(model, 6)
    both = model(x, noise)
    assert len(both.target) == 6
    alone = drawing(model.config, draws=1)
    alone.load_state_dict(model.state_dict())
    for k in range(2):
        one = alone(x, [part[3 * k : 3 * k + 3] for part in noise])
        torch.testing.assert_close(both.log_weight[3 * k : 3 * k + 3], one.log_weight)


def test_outside_training_an_image_is_drawn_once(tiny_config: Make) -> None:
    model = drawing(tiny_config(), draws=2).eval()
    assert len(model(images(model.config)).target) == 3


def test_all_draws_of_an_image_know_its_class_or_none_does(tiny_config: Make) -> None:
    model = drawing(tiny_config(classes=2, label_dropout=0.5), draws=3)
    seen: list[Tensor] = []
    assert model.class_prior is not None
    model.class_prior.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(model.config, 40), labels=torch.ones(40, dtype=torch.int64))
    assert (seen[0].reshape(3, 40) == seen[0][:40]).all() and len(seen[0].unique()) == 2


def test_the_penalty_uses_the_weights_of_the_pass(tiny_config: Make) -> None:
    """Its gradient reaches raw kernels and gains through the same normalisation."""
    model = NVAE(tiny_config(objective={"spectral": 1.0}))
    model(images(model.config))
    model.spectral(model.weights.matrices).backward()
    assert all(g.log_gain.grad is not None for g in [model.stem, model.top, model.head])


@pytest.mark.parametrize("spectral", [0.0, 0.5], ids=["bound", "with penalties"])
def test_gradients_of_the_loss_agree_with_finite_differences(any_config: NVAEConfig, spectral: float) -> None:
    """In float64, at the end of the warm-up, where nothing is held fixed; singular vectors converged."""
    objective = any_config.objective.model_copy(update={"spectral": spectral})
    model = lively(any_config.model_copy(update={"objective": objective})).double().train()
    x, noise = images(any_config).double(), [n.double() for n in noise_for(model)]

    def loss() -> Tensor:
        return model.loss(model(x, noise), 1.0)[0]

    if spectral:
        model.weights.refresh()
        for _ in range(150):
            model.spectral(model.weights.matrices)
    loss().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in [parameters[i] for i in torch.randint(len(parameters), (6,)).tolist()]:
        assert parameter.grad is not None
        i = int(torch.randint(parameter.numel(), ()))
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * step
                values.append(float(loss()))
                parameter.view(-1)[i] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert float(parameter.grad.view(-1)[i]) == pytest.approx(difference, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["activations", "cells"])
def test_recomputation_changes_no_gradient(tiny_config: Make, mode: Any) -> None:
    kept = NVAE(tiny_config(scales=2, flows=1))
    recomputed = copy.deepcopy(kept)
    recomputed.set_recomputation(mode)
    x, noise = images(kept.config), noise_for(kept)
    for model in (kept, recomputed):
        model.loss(model(x, noise), 0.2)[0].backward()
    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(recomputed.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# -------------------------------------------------------------------------------------------------------- precision

BF16 = 2**-8
"""The distance of 1 from the next number in bfloat16."""
AUTOCAST_ERRORS = (4 * BF16, BF16 / 4, 4 * BF16, BF16 / 4, BF16)
"""Of params, reconstruction, kl, log_q, log_p, relative to the largest: twice what is seen over eight seeds."""


def test_under_autocast_likelihood_and_kl_are_float32_and_close(any_config: NVAEConfig) -> None:
    model, x = lively(any_config), images(any_config)
    noise = noise_for(model)
    with torch.no_grad():
        expected = model(x, noise)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, noise)
            values = (output.likelihood.params, output.reconstruction, output.kl, output.log_q, output.log_p)
    assert {value.dtype for value in (*values, *output.z)} == {torch.float32}
    references = (expected.likelihood.params, expected.reconstruction, expected.kl, expected.log_q, expected.log_p)
    for value, reference, allowed in zip(values, references, AUTOCAST_ERRORS, strict=True):
        assert float((value - reference).abs().max() / reference.abs().max()) <= allowed


def test_under_autocast_all_that_follows_the_products_is_exact(any_config: NVAEConfig) -> None:
    """Against float64 from the same parameters, distributions and draws, as rounded as they are."""
    model = lively(any_config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(images(any_config), noise_for(model))
        reconstruction, kl, log_q, log_p = output.reconstruction, output.kl, output.log_q, output.log_p
    kind, channels = LIKELIHOODS[any_config.likelihood.kind], any_config.image_channels
    likelihood = kind(output.likelihood.params.double(), any_config.likelihood, channels)
    torch.testing.assert_close(reconstruction.double(), -likelihood.log_prob(output.target.double()), rtol=1e-5, atol=0)
    q, p = ([Normal(n.mean.double(), n.sigma.double()) for n in side] for side in (output.posterior, output.prior))
    z = [each.double() for each in output.z]
    scores = [score(*each, closed=True) for each in zip(q, p, z, z, strict=True)]
    assert log_q is not None and log_p is not None
    torch.testing.assert_close(log_p.double(), torch.stack([s.log_p for s in scores]).sum(0), rtol=1e-5, atol=0)
    if not any_config.flows:  # the draw before a flow is not in the output
        torch.testing.assert_close(log_q.double(), torch.stack([s.log_q for s in scores]).sum(0), rtol=1e-5, atol=0)
        expected = torch.stack([s.channel_kl.sum(1) for s in scores], dim=1)
        torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_under_autocast_has_the_gradients_of_float32(any_config: NVAEConfig) -> None:
    """To 3 roundings of bf16, over all parameters together; up to 1.5 are seen."""
    exact = lively(any_config).train()
    half, x, noise = copy.deepcopy(exact), images(any_config), noise_for(exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = half.loss(half(x, noise), 0.2)
    assert loss.dtype == metrics["spectral"].dtype == torch.float32
    loss.backward()
    exact.loss(exact(x, noise), 0.2)[0].backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (half, exact))
    assert float((ours - theirs).norm() / theirs.norm()) <= 3 * BF16


def test_a_model_in_float64_is_float64_throughout(any_config: NVAEConfig) -> None:
    model = lively(any_config).double()
    noise = [n.double() for n in noise_for(model)]
    output = model(images(any_config).double(), noise)
    values = (output.likelihood.params, output.kl, output.log_q, output.log_p, *output.z)
    assert {value.dtype for value in values} == {torch.float64}
    assert {q.mean.dtype for q in (*output.posterior, *output.prior)} == {torch.float64}
    single = model.float()(images(any_config) * 0 + output.target.float(), [n.float() for n in noise])
    torch.testing.assert_close(single.kl, output.kl.float(), rtol=1e-3, atol=1e-3)


def test_a_model_in_float64_draws_its_own_noise(any_config: NVAEConfig) -> None:
    model = lively(any_config).double()
    assert model(images(any_config).double()).kl.dtype == torch.float64
    assert model.sample(2).params.dtype == torch.float64


# --------------------------------------------------------------------------------------------- weights that are kept


def test_a_changed_parameter_is_seen_in_evaluation(any_config: NVAEConfig) -> None:
    model, x = lively(any_config), images(any_config)
    noise = noise_for(model)
    with torch.no_grad():
        before = model(x, noise).likelihood.params
        model.head.log_gain.add_(0.5)
        after = model(x, noise).likelihood.params
        assert model.head.bias is not None
        bias = model.head.bias[:, None, None]
    torch.testing.assert_close(after - bias, (before - bias) * torch.tensor(0.5).exp(), rtol=1e-4, atol=1e-5)


def test_a_loaded_state_is_seen_in_evaluation(any_config: NVAEConfig) -> None:
    model, other, x = lively(any_config), lively(any_config), images(any_config)
    noise = noise_for(model)
    with torch.no_grad():
        model(x, noise)
        model.load_state_dict(other.state_dict())
        assert_same(model(x, noise), other(x, noise))


def test_a_copy_of_a_trained_model_works(any_config: NVAEConfig) -> None:
    model, x = NVAE(any_config), images(any_config)
    noise = noise_for(model)
    model.loss(model(x, noise), 0.2)[0].backward()
    twin = copy.deepcopy(model)
    assert_same(twin.eval()(x, noise), model.eval()(x, noise))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert twin(x, noise).kl.abs().sum() > 0


def test_a_state_loads_into_another_model_of_its_config(any_config: NVAEConfig) -> None:
    model = NVAE(any_config)
    model.loss(model(images(any_config)), 0.2)
    other = NVAE(any_config)
    other.load_state_dict(model.state_dict())
    noise, x = noise_for(model), images(any_config)
    assert_same(other.eval()(x, noise), model.eval()(x, noise))
    assert torch.equal(other.loss(other(x, noise), 0.2)[0], model.loss(model(x, noise), 0.2)[0])


# --------------------------------------------------------------------------------------------- the start from data


def elu_responses(model: NVAE, x: Tensor, noise: Noise) -> list[Tensor]:
    """(C, N) outputs of every convolution of a cell."""
    responses: list[Tensor] = []
    ops = [module for module in model.modules() if isinstance(module, RegularOp)]
    hooks = [
        op.register_forward_hook(lambda op, inputs, y: responses.append(y.transpose(0, 1).flatten(1))) for op in ops
    ]
    model(x, noise)
    for hook in hooks:
        hook.remove()
    assert len(responses) == len(ops)
    return responses


def test_once_begun_every_response_has_mean_zero_and_deviation_a_fifth(tiny_config: Make) -> None:
    model = NVAE(tiny_config(architecture="res_elu", scales=2))
    x, noise = images(model.config), noise_for(model)
    model.begin(first_images(x, noise))
    for response in elu_responses(model, x, noise):
        torch.testing.assert_close(response.mean(1), torch.zeros(len(response)), rtol=0, atol=1e-4)
        torch.testing.assert_close(response.std(1), torch.full((len(response),), 0.2), rtol=1e-3, atol=0)


def test_batch_norms_need_no_start(tiny_config: Make) -> None:
    model = NVAE(tiny_config())
    fresh = copy.deepcopy(model.state_dict())
    model.begin(never_read())
    assert all(torch.equal(fresh[name], value) for name, value in model.state_dict().items())


def test_a_start_is_made_once_and_travels_with_the_state(tiny_config: Make) -> None:
    model = NVAE(tiny_config(architecture="res_elu"))
    model.begin(first_images(images(model.config), noise_for(model)))
    other = NVAE(model.config)
    other.load_state_dict(model.state_dict())
    other.begin(never_read())
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_passes_change_no_parameter_of_a_model_that_has_not_begun(tiny_config: Make) -> None:
    model = NVAE(tiny_config(architecture="res_elu"))
    fresh = copy.deepcopy(dict(model.named_parameters()))
    model(images(model.config))
    assert all(torch.equal(fresh[name], parameter) for name, parameter in model.named_parameters())
