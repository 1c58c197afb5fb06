"""The recorded vectors of the published implementation: the network is numerically equal to it.

Every folder of tests/parity/, or of $NVAE_PARITY_DIR, is a case: `checkpoint.pt` in the published format,
`expected.safetensors`, `expected.json`. Agreement is max|Δ| / max|reference| ≤ 1e-5.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nvae.bricks.likelihoods import quantise
from nvae.checkpoints.format import read_safely
from nvae.kernels.fusion import compile_each
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.objective import balance_weights, balanced_kl
from nvae.models.nvae.published import SAFE_TYPES, from_published, to_published

TOLERANCE = 1e-5
ROOT = Path(os.environ.get("NVAE_PARITY_DIR", Path(__file__).parent / "parity"))
CASES = sorted(path.parent for path in ROOT.glob("*/expected.json"))
assert CASES, f"{ROOT} holds no parity cases"
SOONER = {"arch_mbconv_sep": "inductor", "cifar10_flow": "aot_eager"}
"""Compiled without --full too. Separable cells, in both towers, become code; a flow is captured and differentiated, and
run by PyTorch's operators. tests/models/test_compiling.py makes code of two scales and a flow in a smaller model."""


def compiled_cases() -> Iterator[Any]:
    """Every case with "inductor", and those of `SOONER` as said there."""
    for case in CASES:
        sooner = SOONER.get(case.name)
        for backend in dict.fromkeys(("inductor", sooner or "inductor")):
            mark = pytest.mark.slow if backend == sooner else pytest.mark.full
            yield pytest.param(case, backend, marks=mark, id=f"{case.name}-{backend}")


def assert_close(ours: Tensor | float, reference: Tensor | float) -> None:
    ours, reference = torch.as_tensor(ours).double(), torch.as_tensor(reference).double()
    assert ours.shape == reference.shape
    error = float((ours - reference).abs().max() / reference.abs().max())
    assert error <= TOLERANCE


@dataclass
class Case:
    checkpoint: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def model(self) -> NVAE:
        return from_published(self.checkpoint)

    @property
    def image(self) -> Tensor:
        return self.tensors["image"] / 255

    @property
    def noise(self) -> list[Tensor]:
        return [self.tensors[f"noise.{g}"] for g in range(sum(self.facts["groups_per_scale_bottom_up"]))]


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    folder: Path = request.param
    return Case(
        read_safely(folder / "checkpoint.pt", SAFE_TYPES),
        load_file(folder / "expected.safetensors"),
        json.loads((folder / "expected.json").read_text()),
    )


def thinned(image: Tensor) -> Tensor:
    """The recorded part of a decoder tensor: first image, every 4th row and column."""
    return image[:1, :, ::4, ::4]


def test_geometry_and_parameter_count(case: Case) -> None:
    model = case.model()
    assert sum(p.numel() for p in model.parameters()) == case.facts["num_parameters"]
    assert model.config.groups_per_scale == case.facts["groups_per_scale_bottom_up"]


@pytest.fixture(params=["as loaded", "for inference"])
def model(request: pytest.FixtureRequest, case: Case) -> NVAE:
    """The model in each of its forms: none may change a number."""
    return case.model().for_inference() if request.param == "for inference" else case.model()


def test_evaluation(case: Case, model: NVAE) -> None:
    assert_evaluation(case, model)


def assert_evaluation(case: Case, model: NVAE) -> None:
    expected = case.tensors
    with torch.no_grad():
        output = model(case.image, case.noise)
    assert_close(thinned(output.likelihood.params), expected["eval.decoder_params"])
    assert_close(output.kl, expected["eval.kl_per_group"])
    assert_close(output.reconstruction, expected["eval.reconstruction_nll"])
    assert output.log_q is not None and output.log_p is not None
    assert_close(output.log_q, expected["eval.log_q"])
    assert_close(output.log_p, expected["eval.log_p"])
    assert_close(output.log_weight, expected["eval.log_importance_weight"])
    if "eval.decoder_mean" in expected:
        assert_close(thinned(output.likelihood.mean()), expected["eval.decoder_mean"])


@pytest.mark.parametrize(("case", "backend"), list(compiled_cases()), indirect=["case"])
@pytest.mark.timeout(900)  # three scales with flows take five minutes on a core
def test_compiled_parts(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation, and in a pass of training with its gradients against uncompiled ones."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    compiled, model = case.model(), case.model()
    compile_each(compiled.parts())
    assert_evaluation(case, compiled)
    for each in (compiled, model):
        each.train()
        each.loss(each(case.image, case.noise), 0.5)[0].backward()
    pairs = zip(compiled.parameters(), model.parameters(), strict=True)
    gradients = [(mine.grad, other.grad) for mine, other in pairs if mine.grad is not None and other.grad is not None]
    largest = max(float(other.abs().max()) for _, other in gradients)
    for mine, other in gradients:
        error = 1e-4 * max(float(other.abs().max()), 1e-3 * largest)  # some are zero but for rounding
        torch.testing.assert_close(mine, other, rtol=0, atol=error)
    torch._dynamo.reset()


def test_kl_balancing(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        kl = model(case.image, case.noise).kl
    for name, recorded in case.tensors.items():
        if name.startswith("eval.balanced_kl@"):
            coefficient = float(name.partition("@")[2])
            weights = balance_weights(kl, model.balance_factors(kl.device))
            assert_close(balanced_kl(kl, coefficient, weights), recorded)
            used = weights if coefficient < 1 else torch.ones_like(weights)
            assert_close(used, case.tensors[f"eval.kl_coeffs@{coefficient}"])


def test_sampling(case: Case, model: NVAE) -> None:
    for name, recorded in case.tensors.items():
        if name.startswith("sample.decoder_params@"):
            with torch.no_grad():
                likelihood = model.sample(2, temperature=float(name.partition("@")[2]), noise=case.noise)
            assert_close(thinned(likelihood.params), recorded)


def test_regularisers(case: Case) -> None:
    model = case.model()
    model.weights.refresh()
    matrices = [matrix for batch in model.weights.matrices.values() for matrix in batch]
    assert len(matrices) == case.facts["num_spectral_layers"]
    exact = sum(float(torch.linalg.svdvals(matrix.detach().double())[0]) for matrix in matrices)
    assert_close(exact, case.facts["spectral_sum"])
    if case.facts["num_bn_layers"]:
        assert_close(model.batch_norm_penalty().detach(), case.facts["batchnorm_scale_sum"])


def test_power_iteration_is_within_one_percent_of_the_exact_sum(case: Case) -> None:
    model = case.model()
    model.weights.refresh()
    approximate = float(model.spectral(model.weights.matrices))
    assert abs(approximate / case.facts["spectral_sum"] - 1) < 0.01


def test_first_training_pass(case: Case) -> None:
    output = case.model().train()(case.image, case.noise)
    assert_close(output.kl, case.tensors["train.kl_per_group"])
    assert_close(output.reconstruction, case.tensors["train.reconstruction_nll"])


def test_training_trajectory(case: Case) -> None:
    settings = case.facts["train"]
    model = case.model().train()
    optimiser = torch.optim.Adamax(
        model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"], eps=settings["eps"]
    )
    losses = []
    for step in range(len(settings["loss_per_step"])):
        output = model(case.image, case.noise)
        weights = balance_weights(output.kl, model.balance_factors(output.kl.device))
        kl = balanced_kl(output.kl, settings["kl_coeff"], weights)
        loss = (output.reconstruction + kl).mean()
        if case.facts["num_bn_layers"]:
            loss = loss + settings["bn_scale_coeff"] * model.batch_norm_penalty()
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            assert_close(norm, settings["first_step_grad_norm"])
        optimiser.step()
    assert_close(torch.stack(losses), torch.tensor(settings["loss_per_step"]))
    with torch.no_grad():
        output = model.eval()(case.image, case.noise)
    assert_close((output.reconstruction + output.kl.sum(1)).mean(), settings["eval_loss_after"])


def test_round_trip_gives_back_every_tensor_bitwise(case: Case) -> None:
    args: argparse.Namespace = case.checkpoint["args"]
    back = to_published(case.model(), args.dataset)
    assert vars(back["args"]) == vars(args)
    assert back["arch_instance"] == case.checkpoint["arch_instance"]
    assert set(back["state_dict"]) == set(case.checkpoint["state_dict"])
    for name, tensor in case.checkpoint["state_dict"].items():
        assert torch.equal(back["state_dict"][name], tensor), name


def test_quantising_twice_changes_nothing(case: Case) -> None:
    once = quantise(case.image, case.model().config.likelihood.bits)
    assert torch.equal(once, quantise(once, case.model().config.likelihood.bits))
