"""The learned prior: a distribution over maps that sees no future, drawn at the cost of one pass (spec_vqvae §4)."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nvae.bricks.causal import Walk
from nvae.models.vqvae.pixelsnail import MapShape, PixelSNAIL, PixelSNAILConfig, chosen

SHAPE, ABOVE, CLASSES = MapShape(3, 4, 6), MapShape(5, 2, 3), 4
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"attention": True},
    "without": {"attention": False},
    "conditional": {"attention": True, "above": [ABOVE]},
    "two maps above": {"attention": False, "above": [MapShape(2, 1, 3), ABOVE]},
    "classes": {"attention": False, "classes": CLASSES},
    "classes and maps": {"attention": True, "above": [ABOVE], "classes": CLASSES, "output_blocks": 1},
}
LABELS = torch.tensor([2, -1])


def prior(shape: MapShape = SHAPE, above: list[MapShape] | None = None, classes: int = 0, **fields: Any) -> PixelSNAIL:
    """A small prior in eval mode, its weights far from the start."""
    small = {"channels": 16, "inner_channels": 8, "kernel": 3, "blocks": 2, "depth": 1, "dropout": 0.0}
    small |= {"condition_channels": 6, "condition_blocks": 1}
    model = PixelSNAIL(shape, PixelSNAILConfig(**{**small, **fields}), above or [], classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model.eval()


def maps(model: PixelSNAIL, batch: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Codes, and codes of the maps above."""
    above = [torch.randint(stack.codes, (batch, *of)) for stack, of in zip(model.conditions, sizes(model), strict=True)]
    return torch.randint(model.shape.codes, (batch, model.shape.height, model.shape.width)), above


def sizes(model: PixelSNAIL) -> list[tuple[int, int]]:
    height, width = model.shape.height, model.shape.width
    return [(height // stack.factor, width // stack.factor) for stack in model.condition_stacks()]


def conditions(model: PixelSNAIL, above: list[Tensor]) -> Tensor | None:
    return model.condition(above, LABELS if model.classes is not None else None)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> PixelSNAIL:
    kind = dict(request.param)
    if kind.get("above", [])[:1] == [MapShape(2, 1, 3)]:
        kind["shape"] = MapShape(3, 4, 12)
        kind["above"] = [MapShape(2, 1, 3), MapShape(5, 2, 6)]
    return prior(**kind)


# ------------------------------------------------------------------------------------------------------ a distribution


@torch.no_grad()
def test_it_sees_no_code_from_its_position_on(model: PixelSNAIL) -> None:
    codes, above = maps(model)
    known = conditions(model, above)
    logits = model(codes, known).flatten(2)
    for j in range(codes[0].numel()):
        other = codes.flatten(1).clone()
        other[:, j] = (other[:, j] + 1) % model.shape.codes
        changed = model(other.reshape(codes.shape), known).flatten(2)
        assert torch.equal(changed[:, :, : j + 1], logits[:, :, : j + 1])
        assert j == codes[0].numel() - 1 or not torch.equal(changed, logits)


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("label", [1, -1])
def test_probabilities_of_all_maps_sum_to_one(attention: bool, label: int) -> None:
    model = prior(MapShape(2, 2, 4), [MapShape(3, 1, 2)], CLASSES, attention=attention)
    codes = torch.tensor(list(product(range(2), repeat=8))).reshape(-1, 2, 4)
    known = model.condition([torch.tensor([[[0, 2]]])], torch.tensor([label]))
    total = model.nats(codes, known.expand(len(codes), -1, -1, -1)).double().neg().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_class_and_a_map_above_change_what_it_says() -> None:
    model = prior(above=[ABOVE], classes=CLASSES)
    codes, above = maps(model)
    said = [model(codes, model.condition(above, torch.full((2,), label))) for label in (-1, 0, 1)]
    said.append(model(codes, model.condition([(above[0] + 1) % ABOVE.codes], torch.full((2,), 1))))
    for first, second in pairwise(said):
        assert not torch.allclose(first, second)


@torch.no_grad()
def test_no_class_is_what_an_unconditional_prior_has() -> None:
    model = prior(classes=CLASSES)
    codes, _ = maps(model)
    nothing = torch.full((2,), -1)
    torch.testing.assert_close(model(codes, model.condition([], nothing)), model(codes))


def test_under_autocast_logits_and_nats_are_float32() -> None:
    model = prior(attention=True)
    codes, _ = maps(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(codes).dtype == model.nats(codes).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- drawing


def test_one_position_at_a_time_gives_what_a_whole_map_gives(model: PixelSNAIL) -> None:
    codes, above = maps(model)
    with torch.no_grad():
        known, walk = conditions(model, above), Walk(*codes.shape[1:])
        steps = torch.stack([model.step(codes, walk, known) for _ in walk], dim=2)
        whole = model(codes, known).flatten(2)
    assert float((steps - whole).abs().max() / whole.abs().max()) < 1e-6


def drawn(model: PixelSNAIL, noise: Tensor, above: list[Tensor], **options: Any) -> Tensor:
    return model.draw(noise, above, LABELS if model.classes is not None else None, **options)


def test_a_drawn_code_is_where_its_distribution_function_passes_the_noise(model: PixelSNAIL) -> None:
    _, above = maps(model)
    noise = torch.randn(2, 1, model.shape.height, model.shape.width)
    codes = drawn(model, noise, above, temperature=0.7)
    with torch.no_grad():
        p = (model(codes, conditions(model, above)).double() / 0.7).softmax(1)
    function = F.pad(p.cumsum(1), (0, 0, 0, 0, 1, 0))
    u, index = torch.special.ndtr(noise.double()), codes[:, None]
    assert (function.gather(1, index) <= u + 1e-6).all()
    assert (u <= function.gather(1, index + 1) + 1e-6).all()


def test_at_temperature_0_each_code_is_the_mode_whatever_the_noise(model: PixelSNAIL) -> None:
    _, above = maps(model)
    noise = torch.randn(2, 1, model.shape.height, model.shape.width)
    codes = drawn(model, noise, above, temperature=0.0)
    assert torch.equal(codes, drawn(model, -noise, above, temperature=0.0))
    with torch.no_grad():
        assert torch.equal(codes, model(codes, conditions(model, above)).argmax(1))


def test_a_sample_does_not_depend_on_its_batch(model: PixelSNAIL) -> None:
    _, above = maps(model)
    noise = torch.randn(2, 1, model.shape.height, model.shape.width)
    together = drawn(model, noise, above)
    labels = LABELS if model.classes is not None else None
    alone = [
        model.draw(noise[i : i + 1], [map_[i : i + 1] for map_ in above], None if labels is None else labels[i : i + 1])
        for i in range(2)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_frequencies_of_drawn_maps_are_their_probabilities() -> None:
    model = prior(MapShape(2, 1, 3))
    codes = model.draw(torch.randn(20_000, 1, 1, 3))[:, 0]
    found = torch.bincount(codes @ torch.tensor([4, 2, 1]), minlength=8) / len(codes)
    with torch.no_grad():
        every = torch.tensor(list(product(range(2), repeat=3)))[:, None]
        expected = model.nats(every).neg().exp()
    torch.testing.assert_close(found, expected, atol=5 * 0.5 / math.sqrt(len(codes)), rtol=0)


def test_a_code_beyond_the_last_is_never_chosen() -> None:
    logits = torch.zeros(2, 3)
    assert chosen(logits, 1.0, torch.tensor([0.0, 1.0]).double()).tolist() == [0, 2]


def test_guidance_goes_away_from_what_no_class_says() -> None:
    model = prior(MapShape(3, 1, 1), classes=CLASSES, kernel=3)
    label, nothing = torch.tensor([1]), torch.tensor([-1])
    codes, w = torch.zeros(1, 1, 1, dtype=torch.int64), 2.5
    with torch.no_grad():
        known, unknown = (model(codes, model.condition([], label))[0, :, 0, 0] for label in (label, nothing))
    probabilities = ((1 + w) * known - w * unknown).double().softmax(0)
    noise = torch.randn(2000, 1, 1, 1)
    found = model.draw(noise, labels=label.expand(2000), guidance=w).flatten()
    expected = (probabilities.cumsum(0) < torch.special.ndtr(noise.double()).reshape(-1, 1)).sum(1)
    assert torch.equal(found, expected)
    plain = model.draw(noise, labels=label.expand(2000)).flatten()
    assert not torch.equal(found, plain)


# ---------------------------------------------------------------------------------------------------------------- cost


def products_of_a_pass(model: PixelSNAIL) -> int:
    codes, above = maps(model, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(codes, model.condition(above))
    return counter.get_total_flops()


def products_of_drawing(model: PixelSNAIL) -> int:
    _, above = maps(model, 1)
    with FlopCounterMode(display=False) as counter:
        model.draw(torch.randn(1, 1, model.shape.height, model.shape.width), above)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", [True, False])
def test_drawing_a_map_multiplies_no_more_than_one_pass_over_it(attention: bool) -> None:
    model = prior(MapShape(4, 8, 8), [MapShape(4, 4, 4)], attention=attention)
    assert 0.5 < products_of_drawing(model) / products_of_a_pass(model) <= 1


def test_without_attention_the_cost_is_linear_in_the_codes() -> None:
    small, large = (prior(MapShape(4, 8, width), attention=False) for width in (8, 32))
    assert products_of_drawing(large) == 4 * products_of_drawing(small)


# ------------------------------------------------------------------------------------------------------------ training


def test_recomputed_blocks_draw_the_same_dropout_and_give_the_same_gradients() -> None:
    model = prior(attention=True, dropout=0.3).train()
    codes, _ = maps(model)
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(1)
        model.nats(codes).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_channels_that_heads_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="24 are not divisible by 16"):
        PixelSNAILConfig(channels=24)
    assert PixelSNAILConfig(channels=24, attention=False).side == PixelSNAILConfig(kernel=4).side == 5
