"""NVAE and the Very Deep VAE with classes: silent at first, learned, and the same however the model is run."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from kinds import SMALL
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nvae.bricks.labels import ClassVectors
from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.kernels.fusion import compile_each
from nvae.models.hierarchy import Hierarchy
from nvae.models.nvae import published
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE
from nvae.models.vdvae.published import to_published

CLASSES = 3
BINARY = {"image_channels": 1, "likelihood": {"kind": "bernoulli"}}
VERY_DEEP: dict[str, Any] = {
    "image_size": 8,
    "width": 8,
    "widths": "4:12,1:16",
    "latent_channels": 3,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x2,4m1,8m4",
    "bias_up_to": 4,
    "input_mean": 120.0,
    "input_std": 64.0,
}
KINDS: dict[str, Callable[..., Hierarchy[Any]]] = {
    "nvae": lambda **changes: NVAE(validate(NVAEConfig, {**SMALL, **BINARY, "scales": 2, **changes}, "")),
    "nvae with a flow": lambda **changes: NVAE(validate(NVAEConfig, {**SMALL, **BINARY, "flows": 1, **changes}, "")),
    "vanilla": lambda **changes: NVAE(validate(NVAEConfig, {**SMALL, **BINARY, "groups": 1, **changes}, "")),
    "vdvae": lambda **changes: VDVAE(validate(VDVAEConfig, {**VERY_DEEP, **BINARY, **changes}, "")),
}
MNIST: dict[str, Any] = {"image_size": 32, "image_channels": 1, "likelihood": {"kind": "bernoulli", "border": 2}}
Make = Callable[..., Hierarchy[Any]]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a model of a kind, always from the same random numbers."""

    def made(**changes: Any) -> Hierarchy[Any]:
        torch.manual_seed(0)
        return request.param(**changes)  # type: ignore[no-any-return]

    return made


@pytest.fixture
def model(make: Make) -> Hierarchy[Any]:
    """One with classes that has learned something of everything, in eval mode."""
    model = make(classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, ClassVectors):
                module.weight.normal_()
    return model.eval()


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()


def noise(model: Hierarchy[Any], n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in model.latent_shapes(n)]


LABELS = torch.tensor([0, 2, -1, 1])


# ------------------------------------------------------------------------------------------------------- the start


def test_at_its_start_it_is_the_model_without_classes(make: Make) -> None:
    plain, conditional = make(), make(classes=CLASSES)
    without = {name: t for name, t in conditional.state_dict().items() if not name.startswith("class_")}
    assert all(torch.equal(tensor, without[name]) for name, tensor in plain.state_dict().items())
    assert without.keys() == plain.state_dict().keys()
    for training in (True, False):
        ours, theirs = conditional.train(training), plain.train(training)
        output, expected = ours(images(), noise(ours), LABELS), theirs(images(), noise(theirs))
        assert torch.equal(output.log_weight, expected.log_weight)
        assert torch.equal(output.likelihood.params, expected.likelihood.params)
    drawn = conditional.sample(4, noise=noise(conditional), labels=LABELS).params
    assert torch.equal(drawn, plain.sample(4, noise=noise(plain)).params)


def test_gradients_reach_the_vector_of_every_class_that_was_seen(make: Make) -> None:
    model = make(classes=CLASSES, label_dropout=0).train()
    model.loss(model(images(), noise(model), torch.tensor([0, 2, -1, 0])), 1.0)[0].backward()
    vectors = [module for module in model.modules() if isinstance(module, ClassVectors)]
    assert vectors
    for module in vectors:
        assert module.weight.grad is not None
        assert module.weight.grad.abs().sum(1).gt(0).tolist() == [True, False, True]


def test_every_parameter_has_a_gradient_where_all_labels_are_unknown(make: Make) -> None:
    """As the ranks of a parallel run expect it."""
    model = make(classes=CLASSES).train()
    model.loss(model(images(), noise(model), torch.full((4,), -1)), 1.0)[0].backward()
    vectors = [module for module in model.modules() if isinstance(module, ClassVectors)]
    assert all(module.weight.grad is not None and not module.weight.grad.any() for module in vectors)


def test_after_a_few_updates_the_prior_knows_the_class(make: Make) -> None:
    model = make(classes=CLASSES, label_dropout=0).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def means() -> Tensor:
        with torch.no_grad():
            return model.top_down(n=2, labels=torch.tensor([0, 1])).prior().mean

    assert torch.equal(*means())
    for _ in range(5):
        optimiser.zero_grad()
        model.loss(model(images(), noise(model), LABELS), 1.0)[0].backward()
        optimiser.step()
    assert float((means()[0] - means()[1]).abs().max()) > 1e-5


def test_it_overfits_images_by_their_labels(make: Make) -> None:
    """Two classes, of dark images and of bright ones, which samples of them are."""
    torch.manual_seed(0)
    model = make(classes=2, label_dropout=0).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.arange(32) % 2
    x = labels[:, None, None, None].float().expand(-1, 1, 8, 8).contiguous()
    for _ in range(80):
        optimiser.zero_grad()
        model.loss(model(x, labels=labels), 1.0)[0].backward()
        optimiser.step()
    with torch.no_grad():
        drawn = model.eval().sample(40, labels=torch.arange(40) % 2).mean().mean((1, 2, 3))
    assert float((drawn.round() == torch.arange(40) % 2).double().mean()) >= 0.95


# ------------------------------------------------------------------------------------------------- what labels change


def test_labels_decide_samples_and_bounds(model: Hierarchy[Any]) -> None:
    with torch.no_grad():
        one, other = (model(images(), noise(model), labels=torch.full((4,), label)).log_weight for label in range(2))
        assert not torch.isclose(one, other).any()
        one, other = (model.sample(4, noise=noise(model), labels=torch.full((4,), label)).params for label in range(2))
    assert not torch.allclose(one, other)


def test_no_labels_are_unknown_ones(model: Hierarchy[Any]) -> None:
    unknown = torch.full((4,), -1)
    with torch.no_grad():
        assert torch.equal(model(images(), noise(model)).log_weight, model(images(), noise(model), unknown).log_weight)
        plain = model.sample(4, noise=noise(model)).params
        assert torch.equal(plain, model.sample(4, noise=noise(model), labels=unknown).params)


def test_dropped_labels_do_not_matter_in_training_but_in_evaluation(make: Make) -> None:
    model = make(classes=CLASSES, label_dropout=1 - 1e-9)
    for module in model.modules():
        if isinstance(module, ClassVectors):
            nn.init.normal_(module.weight)
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            given, unknown = (model(images(), noise(model), labels).log_weight for labels in (LABELS, None))
            assert torch.equal(given, unknown) == training
            decoded = model.decode(model.encode(images(), LABELS), noise(model)).log_weight
            assert torch.equal(decoded, unknown) == training


# ------------------------------------------------------------------------------------- the same however it is run


def test_folded_it_says_the_same(model: Hierarchy[Any]) -> None:
    folded = model.for_inference()
    with torch.no_grad():
        ours, theirs = (m(images(), noise(model), LABELS) for m in (folded, model))
        torch.testing.assert_close(ours.log_weight, theirs.log_weight, rtol=1e-4, atol=1e-3)
        samples = [m.sample(4, noise=noise(model), labels=LABELS).params for m in (folded, model)]
    torch.testing.assert_close(*samples, rtol=1e-3, atol=1e-3)


def test_many_draws_of_an_encoding_are_of_its_class(model: Hierarchy[Any]) -> None:
    draws = [noise(model), [-epsilon for epsilon in noise(model)]]
    with torch.no_grad():
        features = model.encode(images(), LABELS)
        together = model.decode(features.repeated(2), [torch.cat(parts) for parts in zip(*draws, strict=True)])
        apart = [model.decode(features, epsilon).log_weight for epsilon in draws]
    torch.testing.assert_close(together.log_weight, torch.cat(apart), rtol=1e-4, atol=1e-3)


def test_group_by_group_it_says_the_same(model: Hierarchy[Any]) -> None:
    with torch.no_grad():
        features = model.encode(images(), LABELS)
        whole = model.decode(features, noise(model))
        groups = model.top_down(features)
        for epsilon, z, prior in zip(noise(model), whole.z, whole.prior, strict=True):
            torch.testing.assert_close(groups.prior().mean, prior.mean)
            drawn = groups.posterior().draw(epsilon)
            torch.testing.assert_close(groups.flowed(drawn), z)
            groups.enter(z)
        torch.testing.assert_close(groups.likelihood().params, whole.likelihood.params)
        drawn = model.sample(4, latents=whole.z, labels=LABELS)
    torch.testing.assert_close(drawn.params, whole.likelihood.params, rtol=1e-4, atol=1e-4)


def test_recomputation_changes_no_gradient(make: Make) -> None:
    found = []
    for mode in ("none", "cells"):
        model = make(classes=CLASSES).train()
        model.set_recomputation(mode)  # type: ignore[arg-type]
        model.loss(model(images(), noise(model), LABELS), 1.0)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("class_") for name in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("make", [KINDS["nvae"], KINDS["vdvae"]], ids=["nvae", "vdvae"], indirect=True)
def test_compiled_without_a_graph_break_it_learns_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make(classes=CLASSES).train(), make(classes=CLASSES).train()
    compile_each(compiled.parts())
    for model in (plain, compiled):
        model.loss(model(images(), noise(model), LABELS), 1.0)[0].backward()
    assert counters["stats"]["unique_graphs"] > 0 and dict(counters["graph_break"]) == {}
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, compiled)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0, 3]), "found class 3, but model.classes is 3: allowed are 0 to 2, and -1 where unknown"),
        (torch.tensor([-2, 0]), "found class -2"),
        (torch.tensor([0.0, 1.0]), "classes are int64, found torch.float32"),
        (torch.tensor([0]), r"2 images take \(2,\), found \(1,\)"),
        (torch.tensor([[0], [1]]), r"2 images take \(2,\), found \(2, 1\)"),
    ],
)
def test_wrong_labels_are_refused_by_name(make: Make, labels: Tensor, sentence: str) -> None:
    model = make(classes=CLASSES)
    for call in (
        lambda: model(images(2), labels=labels),
        lambda: model.encode(images(2), labels),
        lambda: model.sample(2, labels=labels),
        lambda: model.top_down(n=2, labels=labels),
    ):
        with pytest.raises(UserError, match=f"labels: {sentence}"):
            call()


def test_guidance_of_normal_latents_is_refused_with_the_reason(make: Make) -> None:
    model = make(classes=CLASSES)
    model.set_guidance(0)
    with pytest.raises(UserError, match=r"guidance: \w+ has none: of Normal latents, .* need not be a distribution"):
        model.set_guidance(1.5)


def test_published_formats_have_no_place_for_classes() -> None:
    with pytest.raises(UserError, match="classes: 3; a published checkpoint of mnist would mean 0"):
        published.args_from_config(NVAEConfig(**MNIST, classes=CLASSES), "mnist")
    with pytest.raises(UserError, match="classes: 3; a published Very Deep VAE has none"):
        to_published(KINDS["vdvae"](classes=CLASSES))  # type: ignore[arg-type]
