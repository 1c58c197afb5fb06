"""Optimisers against their definitions in float64, the schedule's closed form, skipping, averaging."""

import copy
import math
import sys
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvae.bricks.normalisation import BatchNorm
from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.training.adamax import Adamax
from nvae.training.optim import Averaged, OptimConfig, Schedule, SkipRule, build_optimiser


def config(**fields: Any) -> OptimConfig:
    return validate(OptimConfig, fields, "optim")


# ------------------------------------------------------------------------------------------------------- optimisers

STEPS, LR, BETA1, BETA2, EPS, DECAY = 50, 1e-2, 0.9, 0.999, 1e-3, 3e-4


def gradient(step: int, weight: Tensor) -> Tensor:
    """Of something neither constant nor small, with zeros in it."""
    return torch.sin(torch.arange(weight.numel()) + 7.0 * step).reshape(weight.shape).double() * weight * 3


def trajectory(name: str) -> list[Tensor]:
    """The weights after STEPS updates, with the gradients above."""
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2, 1, 3))]
    optimiser = build_optimiser(weights, config(name=name, lr=LR, eps=EPS, weight_decay=DECAY))
    for step in range(STEPS):
        for weight in weights:
            weight.grad = gradient(step, weight.detach())
        optimiser.step()
    return [weight.detach() for weight in weights]


def adamax(weight: Tensor, gradients: Any) -> Tensor:
    """Kingma & Ba 2015, algorithm 2, with L2 weight decay, element by element; eps inside the maximum."""
    m, u = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, STEPS + 1):
        g = gradients(t - 1, weight) + DECAY * weight
        m = BETA1 * m + (1 - BETA1) * g
        u = torch.maximum(BETA2 * u, g.abs() + EPS)
        weight = weight - LR / (1 - BETA1**t) * m / u
    return weight


def adamw(weight: Tensor, gradients: Any) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2: the decay does not pass through the moments."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, STEPS + 1):
        g = gradients(t - 1, weight)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g.square()
        step = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
        weight = weight - LR * DECAY * weight - LR * step
    return weight


@pytest.mark.parametrize(("name", "reference"), [("adamax", adamax), ("adamw", adamw)])
def test_the_optimiser_follows_its_definition_in_float64(name: str, reference: Any) -> None:
    torch.manual_seed(1)
    starts = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 1, 3))]
    for found, start in zip(trajectory(name), starts, strict=True):
        torch.testing.assert_close(found, reference(start, gradient), rtol=1e-13, atol=1e-14)


def network() -> tuple[nn.Module, Tensor]:
    """Parameters of several shapes and two types; the last one never gets a gradient."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2, bias=False), nn.Linear(2, 2).double())
    return model, torch.randn(5, 3)


def updates(model: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """The first layer has no gradient in every third update."""
    for step in steps:
        optimiser.zero_grad()
        model[:3](x * (1 + step)).square().sum().backward()
        if step % 3 == 2:
            model[0].weight.grad = model[0].bias.grad = None
        optimiser.step()


def same_numbers(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-7)


OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 3e-4}


def test_adamax_in_one_piece_is_torchs_where_gradients_come_and_go() -> None:
    (ours, x), (theirs, _) = network(), network()
    mine, reference = Adamax(ours.parameters(), **OPTIONS), torch.optim.Adamax(theirs.parameters(), **OPTIONS)
    updates(ours, x, mine, range(10))
    updates(theirs, x, reference, range(10))
    same_numbers(ours, theirs)
    assert [state["step"] for state in mine.state_dict()["state"].values()] == [7, 7, 10]
    own, other = (optimiser.state_dict()["state"] for optimiser in (mine, reference))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kinds", [(Adamax, torch.optim.Adamax), (torch.optim.Adamax, Adamax)], ids=["to", "from"])
def test_adamax_hands_its_state_to_torchs_and_takes_it(kinds: tuple[Any, Any]) -> None:
    (whole, x), (parted, _) = network(), network()
    throughout = torch.optim.Adamax(whole.parameters(), **OPTIONS)
    updates(whole, x, throughout, range(8))
    first, second = (kind(parted.parameters(), **OPTIONS) for kind in kinds)
    updates(parted, x, first, range(4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    updates(parted, x, second, range(4, 8))
    same_numbers(parted, whole)


def test_the_optimisers_work_on_many_tensors_at_once() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    assert all(group["foreach"] for group in build_optimiser(weights, config(name="adamw")).param_groups)
    adamax = build_optimiser(weights, config())
    for weight in weights:
        weight.grad = torch.ones(2)
    adamax.step()
    for moment in ("exp_avg", "exp_inf"):
        assert len({state[moment].untyped_storage().data_ptr() for state in adamax.state.values()}) == 1


def test_parameters_without_gradient_are_left_out() -> None:
    fixed, trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    optimiser = build_optimiser([fixed, trained], config())
    assert [list(p.shape) for group in optimiser.param_groups for p in group["params"]] == [[3]]


def test_fused_adam_without_apex_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"optim\.name: fused_adam.*not installed.*github\.com/NVIDIA/apex"):
        build_optimiser([nn.Parameter(torch.ones(1))], config(name="fused_adam"))


def test_fused_adam_is_the_decoupled_one_where_apex_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = lambda parameters, **options: seen.update(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    build_optimiser([nn.Parameter(torch.ones(1))], config(name="fused_adam", lr=0.5))
    assert seen == {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 3e-4, "adam_w_mode": True}


# --------------------------------------------------------------------------------------------------------- schedule


def test_the_learning_rate_is_a_line_then_half_a_cosine() -> None:
    schedule = Schedule(config(lr=0.4, lr_min=0.1, warmup_epochs=2), total_steps=50, steps_per_epoch=5, global_batch=8)
    expected = [0.4 * step / 10 for step in range(10)]
    expected += [0.1 + 0.3 * math.cos(math.pi * (step - 10) / 80) ** 2 for step in range(10, 51)]
    assert [schedule(step) for step in range(51)] == pytest.approx(expected, rel=1e-12)


def test_warmup_may_be_given_in_updates() -> None:
    schedule = Schedule(config(warmup_steps=4, warmup_epochs=9), total_steps=50, steps_per_epoch=5, global_batch=8)
    assert [schedule(step) for step in (0, 1, 4)] == pytest.approx([0, 0.25e-2, 1e-2])


def test_a_constant_schedule_stays_after_the_warmup() -> None:
    schedule = Schedule(config(schedule="constant", warmup_steps=2), 50, 5, 8)
    assert {schedule(step) for step in range(2, 50)} == {1e-2}


def test_the_learning_rate_grows_with_the_batch_where_asked() -> None:
    plain, scaled = Schedule(config(), 50, 5, 64), Schedule(config(lr_batch=256), 50, 5, 64)
    assert [scaled(step) for step in range(50)] == pytest.approx([plain(step) / 4 for step in range(50)])


def test_a_run_shorter_than_its_warmup_is_no_error() -> None:
    schedule = Schedule(config(warmup_epochs=5), total_steps=3, steps_per_epoch=10, global_batch=8)
    assert schedule(3) == pytest.approx(1e-2 * 3 / 50)


# --------------------------------------------------------------------------------------------------------- skipping


def test_nothing_is_skipped_without_a_threshold() -> None:
    rule = SkipRule(config())
    assert not any(rule.skips(norm) for norm in (1.0, 1e30, 0.0))


def test_norms_above_the_fixed_threshold_are_skipped() -> None:
    rule = SkipRule(config(skip_norm=2.0))
    assert [rule.skips(norm) for norm in (1.0, 2.0, 2.1, 0.5)] == [False, False, True, False]


def test_norms_far_above_the_usual_ones_are_skipped() -> None:
    rule = SkipRule(config(skip_quantile=0.5, skip_factor=3.0, skip_window=20))
    usual = [rule.skips(1.0 + place % 5) for place in range(20)]  # 1 to 5, median 3
    assert not any(usual)
    assert [rule.skips(norm) for norm in (8.9, 9.1)] == [False, True]


def test_the_adaptive_threshold_waits_for_a_quarter_of_its_window() -> None:
    rule = SkipRule(config(skip_quantile=0.5, skip_factor=1.0, skip_window=20))
    assert [rule.skips(10.0**place) for place in range(6)] == [False] * 5 + [True]


def test_skipping_gives_up_after_the_limit() -> None:
    rule = SkipRule(config(skip_norm=1.0, skip_limit=3))
    assert [rule.skips(9.0) for _ in range(8)] == [True, True, True, False] * 2


def test_a_good_norm_between_starts_the_count_anew() -> None:
    rule = SkipRule(config(skip_norm=1.0, skip_limit=2))
    assert [rule.skips(norm) for norm in (9, 0, 9, 9, 9)] == [True, False, True, True, False]


def test_norms_that_stay_high_become_the_usual_ones() -> None:
    rule = SkipRule(config(skip_quantile=0.5, skip_factor=3.0, skip_window=20, skip_limit=100))
    for _ in range(20):
        rule.skips(1.0)
    skipped = [rule.skips(10.0) for _ in range(30)]
    assert skipped == [True] * skipped.count(True) + [False] * skipped.count(False)
    assert 5 < skipped.count(True) < 15


def test_a_restored_rule_goes_on_as_the_saved_one() -> None:
    options = config(skip_quantile=0.5, skip_factor=1.5, skip_window=12, skip_limit=2)
    norms = [1 + math.sin(7 * place) ** 2 * (place % 3) for place in range(60)]
    rule, restored = SkipRule(options), SkipRule(options)
    for norm in norms[:30]:
        rule.skips(norm)
    restored.load_state_dict(rule.state_dict())
    answers = [rule.skips(norm) for norm in norms[30:]]
    assert answers == [restored.skips(norm) for norm in norms[30:]]
    assert any(answers)


# -------------------------------------------------------------------------------------------------------- averaging


def trained_with_average(steps: int, decay: float) -> tuple[nn.Module, Averaged, list[dict[str, Tensor]]]:
    """A model with batch-norm buffers, its average, and every state it went through, the start first."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNorm(3))
    average = Averaged(model, decay)
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    for _ in range(steps):
        model(torch.randn(4, 2, 3, 3) * 3 + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model, average, states


def test_the_average_is_the_weighted_sum_of_all_states() -> None:
    decay, steps = 0.8, 12
    _, average, states = trained_with_average(steps, decay)
    weights = [decay**steps] + [(1 - decay) * decay ** (steps - t) for t in range(1, steps + 1)]
    assert sum(weights) == pytest.approx(1)
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        expected = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(average.tensors[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_counts_are_copied_not_averaged() -> None:
    _, average, _ = trained_with_average(5, 0.8)
    assert average.tensors["1.num_batches_tracked"] == 5


def test_the_average_in_the_model_is_undone_bit_for_bit() -> None:
    model, average, states = trained_with_average(3, 0.8)
    kept = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with average.in_model():
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, states[-1][name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.tensors.items())


def test_the_average_follows_a_model_that_is_loaded() -> None:
    model, average, states = trained_with_average(3, 0.8)
    model.load_state_dict(states[0])
    average.restart()
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in average.tensors.items())
