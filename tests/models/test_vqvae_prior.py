"""Stage 2 as a family: priors over a frozen stage 1, and a bound that is one (spec_vqvae §1, §4)."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.bricks.quantiser import QuantiserConfig, build_quantiser
from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.data.loading import Batch
from nvae.evaluation.bounds import evaluate_batches
from nvae.models.base import FirstBatch, FirstImages
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vqvae.config import VQVAEConfig, VQVAEPriorConfig
from nvae.models.vqvae.model import VQVAE
from nvae.models.vqvae.prior import VQVAEPrior, drawn_near

IMAGES: dict[str, Any] = {"image_size": 4, "image_channels": 1, "likelihood": {"kind": "bernoulli"}}
FIRST = IMAGES | {"factors": [2, 2], "channels": 8, "residual_channels": 4, "blocks": 1}
SNAIL = {"channels": 16, "inner_channels": 8, "kernel": 3, "blocks": 1, "depth": 1, "dropout": 0.0}
SNAIL |= {"condition_channels": 6, "condition_blocks": 1}
CODES = 2


def first_stage(**changes: Any) -> VQVAE:
    """A first stage whose codes depend on the image."""
    fields = {**FIRST, "family": "vqvae", "quantiser": {"codes": CODES, "dim": 3}, **changes}
    model = VQVAE(validate(VQVAEConfig, fields, "tiny"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if name.endswith("weight") else 1)
        for number, quantiser in enumerate(model.network.quantisers()):
            level = model.network.top_down()[number]
            h = model.network.encode(2 * images(16) - 1)[number]
            message = None if number == 0 else torch.zeros(len(h), 3, *h.shape[2:])
            quantiser.begin(level.vectors(h, message), 0)
    return model.eval()


def config(first: VQVAE | VQVAEPrior, **changes: Any) -> VQVAEPriorConfig:
    fields = {**IMAGES, "family": "vqvae_prior", "codes": "runs/first", "levels": [SNAIL], **changes}
    return validate(VQVAEPriorConfig, fields, "tiny").built_on(first.config)


def prior(first: VQVAE | VQVAEPrior, **changes: Any) -> VQVAEPrior:
    model = VQVAEPrior(config(first, **changes))
    model.take_in(first)
    return model.eval()


def images(batch: int, *, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, (batch, 1, size, size), generator=generator).float()


@pytest.fixture(scope="module")
def first() -> VQVAE:
    torch.manual_seed(2)
    return first_stage()


# -------------------------------------------------------------------------------------------------------- the contract


def test_its_codes_and_its_images_are_those_of_the_first_stage(first: VQVAE) -> None:
    model, x = prior(first), images(5)
    ours, theirs = model(x), first(x)
    for z, other in zip(ours.z, theirs.z, strict=True):
        assert torch.equal(z, other)
    assert len(torch.cat([z.flatten() for z in ours.z]).unique()) > 1
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)
    assert ours.log_q.abs().sum() == 0
    torch.testing.assert_close(ours.log_p, -ours.kl.sum(1))


def test_its_rates_are_the_nats_of_its_priors(first: VQVAE) -> None:
    model = prior(first)
    output = model(images(5))
    top, bottom = (z[:, 0] for z in output.z)
    above = model.prior(1).condition([top])
    expected = torch.stack([model.prior(0).nats(top), model.prior(1).nats(bottom, above)], dim=1)
    torch.testing.assert_close(output.kl, expected)


def test_the_loss_is_nats_a_code_summed_over_the_levels(first: VQVAE) -> None:
    model = prior(first).train()
    output = model(images(5))
    loss, metrics = model.loss(output, 0.0)
    torch.testing.assert_close(loss, output.kl[:, 0].mean() / 1 + output.kl[:, 1].mean() / 4)
    assert metrics["nats_per_code"].shape == (2,)
    torch.testing.assert_close(metrics["nelbo"], metrics["reconstruction"] + metrics["kl"])


def test_the_first_stage_stays_in_evaluation_and_learns_nothing(first: VQVAE) -> None:
    model = prior(first).train()
    assert model.priors.training and not any(module.training for module in model.first.modules())
    loss, _ = model.loss(model(images(5)), 0.0)
    loss.backward()
    assert all(p.grad is None for p in model.first.parameters())
    for name, parameter in model.priors.named_parameters():
        assert parameter.grad is not None, name
    assert model.after_update(0, 0, 0.0) == {}
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.first.state_dict()[name], tensor)


def test_the_decoder_may_train_on_and_codes_stay(first: VQVAE) -> None:
    model = prior(first, train_decoder=True).train()
    x = images(5)
    before = model(x)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss, _ = model.loss(before, 0.0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimiser.step()
    after = model(x)
    for z, other in zip(before.z, after.z, strict=True):
        assert torch.equal(z, other)
    assert after.reconstruction.mean() < before.reconstruction.mean()


def test_autocast_moves_no_code(first: VQVAE) -> None:
    model, x = prior(first), images(200)
    plain = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(x)
    for z, other in zip(plain.z, cast.z, strict=True):
        assert torch.equal(z, other)
    assert cast.kl.dtype == torch.float32


def test_it_is_whole_by_itself(first: VQVAE) -> None:
    model = prior(first)
    again = VQVAEPrior(validate(VQVAEPriorConfig, model.config.model_dump(mode="json"), "saved"))
    again.load_state_dict(model.state_dict())
    x = images(5)
    torch.testing.assert_close(again.eval()(x).log_weight, model(x).log_weight)


def test_recomputation_changes_nothing(first: VQVAE) -> None:
    model = prior(first).train()
    found = []
    for mode in ("none", "cells"):
        model.set_recomputation(mode)
        model.zero_grad()
        loss, _ = model.loss(model(images(5)), 0.0)
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


# ------------------------------------------------------------------------------------------------------------- samples


def test_samples_are_drawn_level_by_level_and_decoded(first: VQVAE) -> None:
    model = prior(first)
    noise = [torch.randn(shape) for shape in model.latent_shapes(6)]
    top = model.prior(0).draw(noise[0])
    bottom = model.prior(1).draw(noise[1], [top])
    expected = first.sample(6, latents=[top[:, None], bottom[:, None]])
    torch.testing.assert_close(model.sample(6, noise=noise).params, expected.params)
    given = model.sample(6, noise=noise, latents=[top[:, None]])
    torch.testing.assert_close(given.params, expected.params)


def test_each_level_has_its_own_temperature(first: VQVAE) -> None:
    model = prior(first)
    noise = [torch.randn(shape) for shape in model.latent_shapes(6)]
    top = model.prior(0).draw(noise[0], temperature=0)
    bottom = model.prior(1).draw(noise[1], [top], temperature=0.5)
    expected = first.sample(6, latents=[top[:, None], bottom[:, None]])
    torch.testing.assert_close(model.sample(6, [0.0, 0.5], noise).params, expected.params)


# --------------------------------------------------------------------------------------------------------------- labels


def test_classes_reach_every_level(first: VQVAE) -> None:
    model, x = prior(first, classes=3), images(4)
    said = [model(x, labels=torch.full((4,), label)).kl for label in (-1, 0, 1)]
    for one, other in ((0, 1), (1, 2)):
        assert (said[one] != said[other]).all()
    torch.testing.assert_close(said[0], model(x).kl)
    noise = [torch.randn(shape) for shape in model.latent_shapes(64)]
    drawn = [model.sample(64, noise=noise, labels=torch.full((64,), label)).params for label in (0, 1)]
    assert not torch.equal(*drawn)


def test_in_training_an_images_noise_decides_whether_its_class_counts(first: VQVAE) -> None:
    model, x = prior(first, classes=3, label_dropout=0.3).train(), images(1).expand(2000, 1, 4, 4)
    noise = [torch.randn(shape) for shape in model.latent_shapes(2000)]
    known, unknown = (model.eval()(x[:1], labels=torch.tensor([label])).kl[0, 0] for label in (1, -1))
    trained = model.train()(x, noise, torch.ones(2000, dtype=torch.int64)).kl[:, 0]
    dropped = torch.isclose(trained, unknown)
    assert torch.isclose(trained[~dropped], known).all()
    assert 0.25 < dropped.float().mean() < 0.35
    part = [epsilon[500:600] for epsilon in noise]
    again = model(x[:100], part, torch.ones(100, dtype=torch.int64)).kl[:, 0]
    torch.testing.assert_close(again, trained[500:600])
    evaluated = model.eval()(x[:100], part, torch.ones(100, dtype=torch.int64)).kl[:, 0]
    assert torch.isclose(evaluated, known).all()


def test_guidance_moves_samples_of_a_class_and_no_others(first: VQVAE) -> None:
    model = prior(first, classes=3)
    with torch.no_grad():
        for snail in model.priors.values():
            snail.classes.weight.mul_(3)  # type: ignore[union-attr, operator]
            snail.logits.gain.mul_(5)  # type: ignore[union-attr, operator]
    noise = [torch.randn(shape) for shape in model.latent_shapes(64)]
    labels, before = torch.full((64,), 1), model.sample(64, noise=noise)
    of_class = model.sample(64, noise=noise, labels=labels)
    model.set_guidance(3)
    assert torch.equal(model.sample(64, noise=noise).params, before.params)
    assert not torch.equal(model.sample(64, noise=noise, labels=labels).params, of_class.params)
    model.set_guidance(0)
    assert torch.equal(model.sample(64, noise=noise, labels=labels).params, of_class.params)


def test_guidance_without_classes_is_refused(first: VQVAE) -> None:
    with pytest.raises(UserError, match=r"guidance: only samples of a class are guided, and model\.classes is 0"):
        prior(first).set_guidance(1)
    with pytest.raises(UserError, match="guidance: is 1; only samples of a class are guided, and classes is 0"):
        config(first, guidance=1)
    with pytest.raises(UserError, match="guidance: takes a number from 0 on, found -1"):
        prior(first, classes=3).set_guidance(-1)


def test_labels_of_a_model_without_classes_are_refused(first: VQVAE) -> None:
    with pytest.raises(UserError, match="takes none"):
        prior(first)(images(4), labels=torch.zeros(4, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------------------- levels


def test_one_level_alone_learns_and_the_others_are_uniform(first: VQVAE) -> None:
    model = prior(first, level=1)
    assert model.prior(0) is None
    output = model(images(5))
    torch.testing.assert_close(output.kl[:, 0], torch.full((5,), math.log(CODES)))
    assert model.sample(3).params.shape == (3, 1, 4, 4)


def test_a_level_on_top_of_a_run_of_another_keeps_what_that_learnt(first: VQVAE) -> None:
    below = prior(first, level=0)
    both = prior(below, level=1).train()
    loss, _ = both.loss(both(images(5)), 0.0)
    loss.backward()
    assert all(p.grad is None for p in both.prior(0).parameters())
    assert all(p.grad is not None for p in both.prior(1).parameters())
    torch.testing.assert_close(both.eval()(images(5)).kl[:, 0], below(images(5)).kl[:, 0])


def test_levels_may_have_priors_of_their_own(first: VQVAE) -> None:
    model = prior(first, levels=[{**SNAIL, "blocks": 2}, {**SNAIL, "attention": False}])
    assert [len(model.prior(level).blocks) for level in range(2)] == [2, 1]
    assert [model.prior(level).attention_blocks()[0].attends for level in range(2)] == [True, False]


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, "model.image_size: is 8, but the first stage of model.codes has 4"),
        ({"levels": [SNAIL] * 3}, "3 priors for 2 levels"),
        ({"level": 2}, "is 2, of 2 levels the last is 1"),
    ],
)
def test_what_does_not_fit_the_first_stage_is_refused(first: VQVAE, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(first, **changes)


def test_a_model_of_another_family_is_no_first_stage(first: VQVAE) -> None:
    own = validate(VQVAEPriorConfig, {"family": "vqvae_prior", "codes": "runs/x"}, "a config")
    other = VDVAEConfig(encoder="32x1,32d32,1x1", decoder="1x1,32m1")
    with pytest.raises(UserError, match="a model of family 'vdvae'"):
        own.built_on(other)


def test_without_its_first_stage_it_cannot_be_built() -> None:
    own = validate(VQVAEPriorConfig, {"family": "vqvae_prior", "codes": "runs/x"}, "a config")
    with pytest.raises(UserError, match=r"model.codes: runs/x was not read"):
        VQVAEPrior(own)


def test_a_run_that_goes_on_keeps_its_first_stage(first: VQVAE) -> None:
    saved = config(first)
    asked = validate(VQVAEPriorConfig, {**IMAGES, "family": "vqvae_prior", "codes": "gone", "levels": [SNAIL]}, "c")
    assert asked.foundation == "gone"
    assert asked.continuing(saved).first_stage == saved.first_stage
    assert asked.continuing(saved).foundation is None


# ----------------------------------------------------------------------------------------------------- the bound is one


def all_codes(model: VQVAEPrior) -> list[Tensor]:
    """Every pair of a 1×1 and a 2×2 map: (32, 1, 1, 1), (32, 1, 2, 2)."""
    every = torch.tensor(list(product(range(CODES), repeat=5)))
    return [every[:, :1].reshape(-1, 1, 1, 1), every[:, 1:].reshape(-1, 1, 2, 2)]


def log_priors(model: VQVAEPrior) -> Tensor:
    """log p of every pair of maps, (32,)."""
    top, bottom = (z[:, 0] for z in all_codes(model))
    return -model.prior(0).nats(top) - model.prior(1).nats(bottom, model.prior(1).condition([top]))


@torch.no_grad()
def test_the_bound_bounds_a_likelihood_that_sums_to_one(first: VQVAE) -> None:
    """4×4 binary images and two levels of binary codes: everything can be counted."""
    model = prior(first)
    x = torch.tensor(list(product((0.0, 1.0), repeat=16))).reshape(-1, 1, 4, 4)
    codes = log_priors(model).double()
    assert float(codes.exp().sum()) == pytest.approx(1, abs=1e-6)
    decoded = model.sample(32, latents=all_codes(model)).params.double().flatten(1)  # (32, 16)
    given = x.flatten(1).double() @ decoded.T - F.softplus(decoded).sum(1)  # (65536, 32)
    likelihood = torch.logsumexp(given + codes, dim=1)
    top, bottom = (torch.cat(maps) for maps in zip(*(first(part).z for part in x.split(8192)), strict=True))
    chosen = torch.cat([top.flatten(1), bottom.flatten(1)], dim=1) @ torch.tensor([16, 8, 4, 2, 1])
    bound = given.gather(1, chosen[:, None]).squeeze(1) + codes[chosen]
    some = torch.arange(0, len(x), 499)
    torch.testing.assert_close(model(x[some]).log_weight.double(), bound[some], rtol=1e-5, atol=1e-5)
    assert len(chosen.unique()) > 4
    assert (bound <= likelihood).all()
    assert float(likelihood.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert 0 < float(bound.exp().sum()) < 1


@torch.no_grad()
def test_drawn_codes_weigh_what_the_likelihood_is_in_the_mean(first: VQVAE) -> None:
    model, x = prior(first, posterior_temperature=3.0), images(3)
    model.begin(FirstImages([FirstBatch(images(16), torch.full((16,), -1), lambda: [])], 16, seed=0))
    assert model.density == "bound"
    latents = all_codes(model)
    each = torch.stack([model.sample(32, latents=latents).log_prob(image.expand(32, 1, 4, 4)) for image in x])
    likelihood = torch.logsumexp(each + log_priors(model), dim=1).exp()
    weights = model.decode(model.encode(x).repeated(20_000)).log_weight.exp().reshape(20_000, 3)
    error = weights.std(0) / math.sqrt(20_000)
    assert (error > 0).any()
    assert ((weights.mean(0) - likelihood).abs() < 5 * error + 1e-3 * likelihood).all()


def test_codes_are_drawn_near_as_often_as_their_distances_say() -> None:
    quantiser = build_quantiser(QuantiserConfig(codes=3, dim=2, start="normal")).eval()
    v = torch.randn(1, 2, 1, 1).double()
    noise = torch.randn(20_000, 1, 1)
    indices, log_q = drawn_near(quantiser, v.expand(20_000, -1, -1, -1).float(), noise, torch.tensor(2.0))
    squares = (v.flatten() - quantiser.codebook).square().sum(1)
    expected = torch.softmax(-squares / 2.0, dim=0)
    found = torch.bincount(indices.flatten(), minlength=3) / 20_000
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(log_q, expected.log().float()[indices.flatten()])


def test_without_a_likelihood_there_is_a_rate_and_a_distortion_and_no_sum() -> None:
    torch.manual_seed(2)
    squared = {"likelihood": {"kind": "squared_error"}}
    model = prior(first_stage(**squared), posterior_temperature=1.0, **squared)
    assert model.density == "none"
    _, metrics = model.loss(model(images(4)), 0.0)
    assert metrics.keys() == {"nats_per_code", "squared_error", "kl"}


def test_an_evaluation_tells_the_model_the_classes(first: VQVAE) -> None:
    model, x, labels = prior(first, classes=3), images(4), torch.tensor([0, 1, 2, -1])
    found = evaluate_batches(model, [Batch(x, list(range(4)), labels)])
    torch.testing.assert_close(found.kl, model(x, labels=labels).kl.double())
    assert found.codes is not None
    assert found.codes.sum(1).tolist() == [4, 16]
