"""The Very Deep VAE: geometry, start, towers, bound, memory; against closed forms and two ways to a number."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from first_images import first_images, never_read
from places import ROOT
from torch import Tensor
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence as torch_kl

from nvae.bricks.latents import Normal
from nvae.bricks.likelihoods import LikelihoodConfig, LogisticMixture, quantise
from nvae.checkpoints.loading import config_from
from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.models.base import Output
from nvae.models.registry import build
from nvae.models.vdvae.config import Layer, VDVAEConfig, parse_layers, parse_widths
from nvae.models.vdvae.model import VDVAE, LatentBlock
from nvae.models.vdvae.standardisation import pixel_moments

CONFIGS = ROOT / "configs"

SMALL: dict[str, Any] = {
    "family": "vdvae",
    "image_size": 8,
    "likelihood": {"components": 2},
    "width": 8,
    "widths": "4:12,1:16",
    "latent_channels": 3,
    "encoder": "8x1,8d2,4x1,4d4,1x1",
    "decoder": "1x2,4m1,4x1,8m4,8x1",
    "bias_up_to": 4,
    "input_mean": 120.0,
    "input_std": 64.0,
}


def config(**fields: Any) -> VDVAEConfig:
    return validate(VDVAEConfig, {**SMALL, **fields}, "test")


@pytest.fixture
def model() -> VDVAE:
    """A small model whose every weight counts: at its start the priors know nothing of the state."""
    model = VDVAE(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randint(256, (2, 3, 8, 8)) / 255


def noise(model: VDVAE, n: int) -> list[Tensor]:
    return [torch.randn(shape) for shape in model.latent_shapes(n)]


# --------------------------------------------------------------------------------------------------------- geometry


def test_layer_strings_say_blocks_pooling_and_mixing() -> None:
    assert parse_layers("encoder", "32x2, 32d4,8", "d") == [Layer(32), Layer(32), Layer(32, pool=4), Layer(8)]
    assert parse_layers("decoder", "1,4m1", "m") == [Layer(1), Layer(4, below=1)]
    assert parse_widths("64:8,32:16") == {64: 8, 32: 16}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"encoder": "8x1,8d2,4q2"}, "encoder: '4q2' is not a layer: write R, RxN or RdK"),
        ({"decoder": "1x1,8d4"}, "decoder: '8d4' is not a layer: write R, RxN or RmK"),
        ({"encoder": "8x1,8d2,8x1"}, "encoder: a block at resolution 8 follows an output of 4"),
        ({"encoder": "16x1"}, "encoder: a block at resolution 16 follows an output of 8"),
        ({"encoder": "8d3"}, "encoder: 8 pixels can't be pooled by 3"),
        ({"decoder": "1x1,2m1,8m2"}, "decoder: resolution 2 is not one of the encoder's (8, 4, 1)"),
        ({"decoder": "1x1,4m8,8x1"}, "4m8: no state of resolution 8 can be enlarged to 4 (possible: 1)"),
        ({"decoder": "1x1,4m4,8x1"}, "4m4: no state of resolution 4 can be enlarged to 4 (possible: 1)"),
        ({"decoder": "1x10000,4m1,8x1"}, "decoder: '1x10000' is not a layer"),
        ({"decoder": "1x1,4m1"}, "decoder: has no block at the image's resolution, 8"),
        ({"decoder": "4x1,8m4"}, "decoder: has no block at the encoder's last resolution, 1"),
        ({"widths": "8:16"}, "widths: 16 at the image's resolution, 8, where `width` is 8"),
        ({"widths": "4:4,1:16"}, "widths: 8 at resolution 8 but 4 at 4: they can't grow with it"),
        ({"widths": "4-4"}, "widths: '4-4' is not a resolution and its width"),
        ({"bottleneck": 0.1}, "bottleneck: 0.1 of width 8 leaves no channel"),
        ({"input_std": None}, "input_mean, input_std: give both, or neither"),
        ({"likelihood": {"kind": "bernoulli"}}, "likelihood.kind: bernoulli is for one-channel images"),
    ],
)
def test_impossible_geometry_is_one_clear_line(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        config(**fields)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("recipe", "parameters", "blocks"),
    [
        ("vdvae_cifar10", 39_145_700, 43),
        ("vdvae_imagenet_32", 119_280_868, 78),
        ("vdvae_imagenet_64", 125_005_860, 75),
        ("vdvae_ffhq_256", 114_874_852, 66),
        ("vdvae_ffhq_1024", 109_366_904, 70),
    ],
)
def test_recipes_have_the_published_size_to_the_last_digit(recipe: str, parameters: int, blocks: int) -> None:
    with torch.device("meta"):
        model = build(config_from(CONFIGS / f"{recipe}.yaml"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.latent_shapes(1)) == blocks


# -------------------------------------------------------------------------------------------------------- the start


def test_the_start_scales_what_adds_to_a_state_and_silences_priors() -> None:
    model = VDVAE(config(width=64, widths="", encoder="8x15,8d8", decoder="1x1,8m1,8x2"))
    bound = 1 / math.sqrt(16)  # PyTorch's, for the 16 inputs of a last 1×1
    largest = {name: float(p.detach().abs().max()) for name, p in model.named_parameters()}
    limits = {f"encoder.{i}.block.expand.weight": bound / 4 for i in range(16)}
    for i in range(4):
        limits |= {f"decoder.{i}.posterior.expand.weight": bound, f"decoder.{i}.residual.expand.weight": bound / 2}
        limits |= {f"decoder.{i}.prior.expand.weight": 0, f"decoder.{i}.project.weight": 1 / math.sqrt(3) / 2}
    for name, limit in limits.items():
        assert 0.9 * limit <= largest[name] <= limit, name
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias") or "biases" in name)


def test_priors_start_as_standard_normal(image: Tensor) -> None:
    output = VDVAE(config()).eval()(image)
    assert all(torch.equal(p.mean, torch.zeros_like(p.mean)) for p in output.prior)
    assert all(torch.equal(p.sigma, torch.ones_like(p.sigma)) for p in output.prior)


def test_states_above_the_limit_start_at_zeros_without_parameters(model: VDVAE) -> None:
    assert list(model.biases) == ["1", "4"]
    assert not model.initial_states(2)[8].any()


def test_every_parameter_takes_part(model: VDVAE, image: Tensor) -> None:
    loss, _ = model.loss(model(image), 0.0)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ------------------------------------------------------------------------------------------------------- the towers


def test_channels_beyond_a_narrower_width_start_at_zero_and_outputs_count_after_pooling(image: Tensor) -> None:
    model = VDVAE(config(encoder="8x1,8d2,4d4"))
    taps = model.encode(image).taps
    assert {resolution: tap.shape[1] for resolution, tap in taps.items()} == {8: 8, 4: 12, 1: 16}
    assert taps[4][:, :8].any() and not taps[4][:, 8:].any()


def test_the_encoder_sees_all_bits_and_the_target_is_truncated() -> None:
    model = VDVAE(config(likelihood={"bits": 5, "grid": "truncated", "components": 2}))
    byte = torch.randint(32, (1, 3, 8, 8)) * 8
    plain, noisy = model.encode(byte / 255), model.encode((byte + 7) / 255)
    assert torch.equal(plain.target, noisy.target)
    torch.testing.assert_close(plain.target, byte / 255)
    assert not torch.equal(plain.taps[1], noisy.taps[1])


def test_prior_and_posterior_see_the_state_and_its_concatenation_with_the_tap(model: VDVAE) -> None:
    block = model.decoder[3]
    assert isinstance(block, LatentBlock)
    state, image = torch.randn(2, 2, block.width, 4, 4).unbind()
    for_prior, for_posterior = block._reduced(state, F.gelu(image))
    torch.testing.assert_close(block.prior.reduced(for_prior), block.prior(state))
    concatenated = block.posterior(torch.cat([state, image], dim=1))
    torch.testing.assert_close(block.posterior.reduced(for_posterior), concatenated)


def test_a_state_takes_the_first_channels_of_the_one_below_enlarged(model: VDVAE) -> None:
    block = model.decoder[4]
    assert isinstance(block, LatentBlock) and block.below == 4
    x, below = torch.randn(2, 8, 8, 8), torch.randn(2, 12, 4, 4)
    enlarged = below[:, :8].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(block.joined(x, below), x + enlarged)


def test_kl_and_densities_are_those_of_normal_distributions(model: VDVAE, image: Tensor) -> None:
    output = model.double().eval()(image.double(), [n.double() for n in noise(model, 2)])

    def torch_normal(normal: Normal) -> TorchNormal:
        return TorchNormal(normal.mean, normal.sigma)

    for g, (q, p, z) in enumerate(zip(output.posterior, output.prior, output.z, strict=True)):
        torch.testing.assert_close(torch_kl(torch_normal(q), torch_normal(p)).sum((1, 2, 3)), output.kl[:, g])
        assert z.shape == model.latent_shapes(2)[g]
    for densities, total in ((output.posterior, output.log_q), (output.prior, output.log_p)):
        each = [torch_normal(d).log_prob(z).sum((1, 2, 3)) for d, z in zip(densities, output.z, strict=True)]
        torch.testing.assert_close(torch.stack(each).sum(0), total)


def test_sigma_is_the_exponential_times_the_temperature() -> None:
    raw = torch.randn(2, 6, 4, 4)
    normal = Normal.from_log_sigma(raw, 0.7)
    torch.testing.assert_close(normal.sigma, 0.7 * raw[:, 3:].exp())
    torch.testing.assert_close(normal.mean, raw[:, :3])


def test_one_encoding_serves_many_draws(model: VDVAE, image: Tensor) -> None:
    draws = [noise(model, 2) for _ in range(3)]
    features = model.encode(image)
    together = model.decode(features.repeated(3), [torch.cat(parts) for parts in zip(*draws, strict=True)])
    apart = [model(image, draw) for draw in draws]
    torch.testing.assert_close(together.log_weight, torch.cat([output.log_weight for output in apart]))
    assert features.repeated(3).taps is features.taps


def test_given_latents_are_kept_and_scored(model: VDVAE, image: Tensor) -> None:
    given = noise(model, 2)
    drawn = model(image, given)
    again = model.decode(model.encode(image), noise(model, 2), latents=drawn.z)
    torch.testing.assert_close(again.log_weight, drawn.log_weight)
    prefix = model.decode(model.encode(image), noise(model, 2), latents=drawn.z[:4])
    assert all(torch.equal(a, b) for a, b in zip(prefix.z[:4], drawn.z[:4], strict=True))
    assert not torch.equal(prefix.z[4], drawn.z[4])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_stepping_through_the_blocks_is_decoding(model: VDVAE, image: Tensor, precision: torch.dtype) -> None:
    """Bit for bit: priors, posteriors, latents and the likelihood's parameters."""
    given = noise(model, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        features = model.eval().encode(image)
        output = model.decode(features, given)
        blocks = model.top_down(features)
        for i, epsilon in enumerate(given):
            q, p = blocks.posterior(), blocks.prior()
            for found, expected in ((q, output.posterior[i]), (p, output.prior[i])):
                assert torch.equal(found.mean, expected.mean) and torch.equal(found.sigma, expected.sigma)
            z = blocks.flowed(q.draw(epsilon))
            assert torch.equal(z, output.z[i])
            blocks.enter(z)
        assert torch.equal(blocks.likelihood().params, output.likelihood.params)


def test_stepping_without_features_is_sampling(model: VDVAE) -> None:
    given = noise(model, 2)
    blocks = model.top_down(n=2)
    for epsilon in given:
        blocks.enter(blocks.prior(0.7).draw(epsilon))
    assert torch.equal(blocks.likelihood().params, model.sample(2, 0.7, given).params)


def test_the_priors_of_given_latents_are_the_same_with_features_and_without(model: VDVAE, image: Tensor) -> None:
    """Up to rounding: beside a posterior, the first convolution of both is one."""
    output = model.eval()(image, noise(model, 2))
    blocks = model.top_down(n=2)
    for z, p in zip(output.z, output.prior, strict=True):
        torch.testing.assert_close(blocks.prior().mean, p.mean)
        torch.testing.assert_close(blocks.prior().sigma, p.sigma)
        blocks.enter(z)


def test_in_training_the_distributions_are_not_kept(model: VDVAE, image: Tensor) -> None:
    output = model.train()(image)
    assert output.posterior == output.prior == []


def test_a_prefix_of_latents_fixes_the_first_blocks_only(model: VDVAE) -> None:
    first, second = noise(model, 2), noise(model, 2)
    mixed = model.sample(2, noise=first[:3] + second[3:])
    z = model.sample(2, noise=second)  # another image
    latents = latents_of(model, first)[:3]
    torch.testing.assert_close(model.sample(2, noise=second, latents=latents).params, mixed.params)
    assert not torch.allclose(z.params, mixed.params)


def latents_of(model: VDVAE, noise: list[Tensor]) -> list[Tensor]:
    """The prior's draws from a noise, block by block: the z that `generate` takes in."""
    seen: list[Tensor] = []
    hooks = [
        block.get_submodule("project").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for block in model.decoder
    ]
    model.sample(len(noise[0]), noise=noise)
    for hook in hooks:
        hook.remove()
    return seen


def test_temperature_is_a_number_or_one_for_each_block_and_acts_on_latents_only(model: VDVAE) -> None:
    blocks, given = len(model.decoder), noise(model, 2)
    assert torch.equal(model.sample(2, 0.6, given).params, model.sample(2, [0.6] * blocks, given).params)
    cold = model.sample(2, [0.0] * blocks, given).params
    assert torch.equal(cold, model.sample(2, 0.0, noise(model, 2)).params)
    latents = latents_of(model, given)
    assert torch.equal(model.sample(2, 0.1, latents=latents).params, model.sample(2, 1.0, latents=latents).params)
    with pytest.raises(UserError, match="temperature: 2 values for 6 latent groups"):
        model.sample(2, [0.6, 0.7])


# -------------------------------------------------------------------------------------------------------- the bound


def test_the_loss_is_in_nats_per_dimension_that_counts() -> None:
    binary = {"kind": "bernoulli", "border": 1}
    model = VDVAE(config(image_channels=1, likelihood=binary))
    output = model((torch.rand(4, 1, 8, 8) < 0.5).float())
    loss, metrics = model.loss(output, 0.0)
    torch.testing.assert_close(loss.detach() * 36, metrics["nelbo"])
    torch.testing.assert_close(metrics["nelbo"], metrics["reconstruction"] + metrics["kl"])
    torch.testing.assert_close(metrics["kl"], output.kl.sum(1).mean().detach())


@pytest.mark.parametrize(
    ("channels", "likelihood"),
    [(1, {"kind": "bernoulli"}), (1, {"components": 2}), (3, {"components": 2}), (3, {"kind": "normal"})],
)
def test_every_likelihood_serves(channels: int, likelihood: dict[str, Any]) -> None:
    model = VDVAE(config(image_channels=channels, likelihood=likelihood))
    output: Output = model(torch.randint(2, (2, channels, 8, 8)).float())
    assert output.log_weight.shape == (2,)
    assert model.sample(2).sample().shape == (2, channels, 8, 8)


def five_bit_mass(edge: str, log_scale: float, mean: float, grid_levels: slice) -> float:
    """The probability that a one-component mixture gives to some of the 32 truncated levels."""
    c = LikelihoodConfig(bits=5, grid="truncated", components=1, edge=edge)  # type: ignore[arg-type]
    x = quantise(torch.arange(0, 256, 8) / 255, 5, "truncated")[grid_levels, None, None, None]
    params = torch.tensor([0.0, mean, log_scale]).reshape(1, 3, 1, 1).expand(len(x), -1, -1, -1)
    return float(LogisticMixture(params, c, 1).log_prob(x).exp().sum())


def test_five_bit_probabilities_sum_to_one_by_default() -> None:
    assert five_bit_mass("right", -2.0, 0.9, slice(None)) == pytest.approx(1, abs=1e-5)
    assert five_bit_mass("right", 1.0, -3.0, slice(None)) == pytest.approx(1, abs=1e-5)


def test_published_five_bit_bins_overlap_and_lack_the_right_tail() -> None:
    inside = slice(8, 24)
    ratio = five_bit_mass("published", 1.0, 0.0, inside) / five_bit_mass("right", 1.0, 0.0, inside)
    assert ratio == pytest.approx((2 / 31) / (8 / 127.5), rel=1e-4)  # 1.028
    assert five_bit_mass("published", -1.0, 3.0, slice(None)) < 0.2


# ---------------------------------------------------------------------------------------------- input normalisation


def test_open_moments_are_measured_when_a_run_begins() -> None:
    x = torch.randint(256, (8, 3, 8, 8)) / 255
    model = VDVAE(config(input_mean=None, input_std=None))
    model.begin(first_images(x))
    mean, std = model.input.moments
    pixels = 255 * x.double()
    assert mean == pytest.approx(float(pixels.mean()), abs=1e-4)
    assert std == pytest.approx(float(pixels.std(correction=0)), abs=1e-4)


def test_measured_moments_are_as_good_as_given_ones(image: Tensor) -> None:
    measured = VDVAE(config(input_mean=None, input_std=None))
    measured.begin(first_images(image))
    mean, std = pixel_moments([image])
    given = VDVAE(config(input_mean=mean, input_std=std))
    given.load_state_dict(measured.state_dict())
    draws = noise(given, 2)
    assert torch.equal(measured(image, draws).log_weight, given(image, draws).log_weight)


def test_measured_moments_travel_with_the_state_and_given_ones_stay(image: Tensor) -> None:
    measured = VDVAE(config(input_mean=None, input_std=None))
    measured.begin(first_images(image))
    other, given = VDVAE(measured.config), VDVAE(config(input_mean=1.5, input_std=2.5))
    for model in (other, given):
        model.load_state_dict(measured.state_dict())
    assert other.input.moments == measured.input.moments
    assert given.input.moments == (1.5, 2.5)
    assert not [name for name in given.state_dict() if name.startswith("input")]


def test_given_moments_are_not_measured() -> None:
    VDVAE(config()).begin(never_read())


def test_a_run_that_goes_on_has_the_moments_it_had() -> None:
    opened = config(input_mean=None, input_std=None)
    assert opened.continuing(config()) == config()
    assert config().continuing(config(input_mean=1, input_std=1)) == config()
    assert opened.continuing(opened) == opened


def test_images_of_one_grey_are_refused() -> None:
    with pytest.raises(UserError, match="all of one grey"):
        pixel_moments([torch.full((2, 1, 8, 8), 0.5)])


def test_a_model_without_moments_says_so(image: Tensor) -> None:
    with pytest.raises(UserError, match=r"model\.input_mean, model\.input_std: not measured"):
        VDVAE(config(input_mean=None, input_std=None))(image)


# ------------------------------------------------------------------------------------------ precision and recomputation


def test_states_and_bound_stay_in_float32_under_autocast(model: VDVAE, image: Tensor) -> None:
    given = noise(model, 2)
    states: list[Tensor] = []
    for block in model.encoder:
        block.register_forward_hook(lambda module, inputs, state: states.append(state))
    model.head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image, given)
        taps = model.encode(image).taps
    loss, _ = model.loss(output, 0.0)
    exact, _ = model.loss(model(image, given), 0.0)
    assert {tensor.dtype for tensor in [*states, output.kl, output.likelihood.params, loss]} == {torch.float32}
    assert {tap.dtype for tap in taps.values()} == {torch.bfloat16}
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def gradients(model: VDVAE, image: Tensor, given: list[Tensor]) -> list[Tensor]:
    loss, _ = model.loss(model(image, given), 0.0)
    parameters = list(model.parameters())
    return list(torch.autograd.grad(loss, parameters))


def test_recomputing_blocks_changes_no_bit_of_the_gradients(model: VDVAE, image: Tensor) -> None:
    given = noise(model, 2)
    kept = gradients(model, image, given)
    model.set_recomputation("cells")
    for ours, reference in zip(gradients(model, image, given), kept, strict=True):
        assert torch.equal(ours, reference)


def test_noise_and_latents_that_do_not_fit_are_refused(model: VDVAE, image: Tensor) -> None:
    with pytest.raises(UserError, match="noise: 5 tensors for 6 latent groups"):
        model(image, noise(model, 2)[:5])
    with pytest.raises(UserError, match=r"noise: group 0 takes \(2, 3, 1, 1\), found \(1, 3, 1, 1\)"):
        model.sample(2, noise=noise(model, 1))
    with pytest.raises(UserError, match="latents: 7 tensors for 6 latent groups"):
        model.sample(2, latents=[*noise(model, 2), torch.zeros(2, 3, 8, 8)])
    with pytest.raises(UserError, match="latents: group 1 takes"):
        model.decode(model.encode(image), latents=[torch.zeros(2, 3, 1, 1), torch.zeros(1)])
