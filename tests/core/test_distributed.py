"""Ranks: one process needs none, and two are as good as one with the joined batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from nvae.bricks.cells import Cell, Separable
from nvae.bricks.convolutions import Conv2d
from nvae.bricks.normalisation import BatchNorm, measuring
from nvae.core import distributed
from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.objective import balance_weights

WORLD = 2


# ------------------------------------------------------------------------------------------------------ one process


def test_one_process_is_rank_zero_of_one() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)


def test_in_one_process_everything_is_the_identity() -> None:
    value = torch.randn(3, requires_grad=True)
    assert distributed.all_mean(value) is value
    assert distributed.mean_over_ranks(value) is value
    assert distributed.sum_over_ranks(value) is value
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.from_rank_zero("x") == "x"
    assert distributed.any_rank(True, torch.device("cpu"))
    assert not distributed.any_rank(False, torch.device("cpu"))
    distributed.barrier()
    distributed.check_same_state(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [((8, 0), ["sm_75", "sm_80"]), ((8, 9), ["sm_86"]), ((12, 1), ["sm_90", "compute_120"]), ((9, 0), ["sm_90a"])],
)
def test_a_gpu_that_the_build_has_code_for_is_served(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    distributed.require_served("a GPU", capability)


def test_a_gpu_that_the_build_has_no_code_for_is_one_line_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    with pytest.raises(UserError, match=r'Tesla V100 \(compute capability 7\.0\).* pip install "torch<2\.15"') as told:
        distributed.require_served("Tesla V100", (7, 0))
    assert "\n" not in str(told.value)


def test_one_process_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start(torch.device("cpu"), timeout_minutes=1) == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    distributed.stop()


# ----------------------------------------------------------------------------------------------------- two processes

Facts = dict[str, Any]


def norm_input() -> Tensor:
    """The joined batch; its means are 300 times its deviations."""
    return torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(1)) + 300


def tiny() -> NVAE:
    torch.manual_seed(2)
    small = {"image_size": 8, "groups": 2, "scales": 2, "flows": 1, "latent_channels": 2, "halvings": 0}
    narrow = {"encoder_channels": 4, "decoder_channels": 4, "encoder_cells": 1, "decoder_cells": 1}
    config = {**small, **narrow, "likelihood": {"components": 1}, "objective": {"spectral": 0.1}}
    return NVAE(validate(NVAEConfig, config, "tiny")).double()


def images(model: NVAE, rows: slice) -> tuple[Tensor, list[Tensor]]:
    """Rows of a batch of four with its noise."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(256, (4, 3, 8, 8), generator=generator).double() / 255
    noise = [torch.randn(shape, generator=generator).double() for shape in model.latent_shapes(4)]
    return x[rows], [n[rows] for n in noise]


def share(batch: Tensor) -> Tensor:
    """This rank's part of a joined batch."""
    return batch.chunk(distributed.world_size())[distributed.rank()]


def mean_facts() -> Facts:
    """Gradients through all_mean, of a parameter of which every rank sees another multiple."""
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    seen = theta * (distributed.rank() + 1)  # 1·θ, 2·θ: the mean is 1.5·θ
    mean = distributed.all_mean(seen)
    loss = mean.square() * (10 if distributed.rank() else 1)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient, theta)
    return {"mean": mean.detach(), "gradient": gradient.detach(), "second": second}


def norm_facts(into_convolution: bool) -> Facts:
    norm = BatchNorm(5, "swish")
    nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(4)
    convolution = Conv2d(5, 5, 3)
    x = share(norm_input()).requires_grad_()
    y = norm.into(convolution, x) if into_convolution else norm(x)
    (y * share(torch.linspace(-1, 1, norm_input().numel()).reshape(8, 5, 3, 3))).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "buffers": dict(norm.named_buffers())}


def measured_facts() -> Facts:
    norm = BatchNorm(5)
    with measuring([norm]):
        norm(share(norm_input()))
    return dict(norm.named_buffers())


def cell_facts() -> Facts:
    """Gradients of a recomputed cell, and how many collectives its backward pass begins."""
    torch.manual_seed(6)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(6)
        cell = Cell((Separable(),), 5, "same", squeeze_excite=True)
        cell.recompute = recompute
        cell(share(norm_input())).square().sum().backward()
        gradients.append([p.grad for p in cell.parameters()])
    return {"kept": gradients[0], "recomputed": gradients[1]}


def model_facts() -> Facts:
    """One training pass of a model, as data parallelism averages it."""
    model = tiny().train()
    rank, world = distributed.rank(), distributed.world_size()
    part = slice(4 // world * rank, 4 // world * (rank + 1))
    output = model(*images(model, part))
    loss, metrics = model.loss(output, 0.1)
    loss.backward()
    gradients = {n: distributed.mean_over_ranks(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {
        "kl": output.kl.detach(),
        "loss": distributed.mean_over_ranks(loss.detach()),
        "spectral": metrics["spectral"],
        "gradients": gradients,
        "state": model.state_dict(),
    }


def reduction_facts() -> Facts:
    rank = distributed.rank()
    value = torch.tensor([1.0, 2.0]) * (rank + 1)
    return {
        "sum": distributed.sum_over_ranks(value),
        "mean": distributed.mean_over_ranks(value),
        "untouched": value,
        "any": distributed.any_rank(rank == 1, torch.device("cpu")),
        "none": distributed.any_rank(False, torch.device("cpu")),
        "objects": distributed.gather_objects({"rank": rank}),
        "zero": distributed.from_rank_zero(f"from {rank}"),
        "given": given_by_rank_zero(),
        "balance": balance_weights(torch.full((3, 2), float(rank)) * torch.tensor([1.0, 3.0]), torch.ones(2)),
    }


def given_by_rank_zero() -> list[Tensor]:
    """Tensors of two types, one of them with channels last, after rank 0 gave its numbers to all."""
    tensors = [torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last), torch.tensor([True])]
    if distributed.rank():
        tensors = [torch.zeros_like(tensor) for tensor in tensors]
    distributed.to_all_ranks(tensors)
    return tensors


def state_facts() -> Facts:
    """What check_same_state says of equal states, of a difference, and of a number that is none on one rank only."""
    complaints = []
    for change in (0.0, float(distributed.rank()), torch.nan * distributed.rank() if distributed.rank() else 0.0):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for parameter in module.parameters():
            nn.init.constant_(parameter, 3.0)
        module[1].bias.data[0] += change
        try:
            distributed.check_same_state(module)
            complaints.append("")
        except UserError as error:
            complaints.append(str(error))
    return {"complaints": complaints}


def all_facts() -> dict[str, Facts]:
    return {
        "mean": mean_facts(),
        "norm": norm_facts(into_convolution=False),
        "norm into convolution": norm_facts(into_convolution=True),
        "measured": measured_facts(),
        "cell": cell_facts(),
        "model": model_facts(),
        "reductions": reduction_facts(),
        "state": state_facts(),
    }


def save_facts(folder: Path) -> None:
    torch.save(all_facts(), folder / f"{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Facts]]]:
    """The facts of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, save_facts, folder)
    yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Facts]:
    """The facts of one process."""
    return all_facts()


def joined(ranks: list[dict[str, Facts]], fact: str, key: str) -> Tensor:
    return torch.cat([rank[fact][key] for rank in ranks])


def test_reductions_see_every_rank(ranks: list[dict[str, Facts]]) -> None:
    for rank, facts in enumerate(r["reductions"] for r in ranks):
        assert facts["sum"].tolist() == [3, 6]
        assert facts["mean"].tolist() == [1.5, 3]
        assert facts["untouched"].tolist() == [rank + 1, 2 * (rank + 1)]
        assert facts["any"]
        assert not facts["none"]
        assert facts["objects"] == [{"rank": 0}, {"rank": 1}]
        assert facts["zero"] == "from 0"
        assert facts["given"][0].flatten().tolist() == list(range(16)) and facts["given"][1].tolist() == [True]


def test_the_gradient_of_the_mean_is_that_of_the_mean_loss(ranks: list[dict[str, Facts]]) -> None:
    """The ranks' mean loss is (1 + 10)/2 · (1.5 θ)²."""
    assert all(float(r["mean"]["mean"]) == 3 for r in ranks)
    assert float(sum(r["mean"]["gradient"] for r in ranks)) / WORLD == pytest.approx(5.5 * 2 * 1.5**2 * 2)


def test_the_second_derivative_of_the_mean_is_that_of_the_mean_loss(ranks: list[dict[str, Facts]]) -> None:
    """Each rank's gradient g_r is θ·a_r·mean_r'(3·c_r'·a) with a = 1, 2; differentiated once more by θ."""
    assert float(sum(r["mean"]["second"] for r in ranks)) / WORLD == pytest.approx(5.5 * 2 * 1.5**2)


@pytest.mark.parametrize("fact", ["norm", "norm into convolution"])
def test_batch_norm_of_two_ranks_is_that_of_the_joined_batch(
    ranks: list[dict[str, Facts]], alone: dict[str, Facts], fact: str
) -> None:
    torch.testing.assert_close(joined(ranks, fact, "y"), alone[fact]["y"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joined(ranks, fact, "x"), alone[fact]["x"], rtol=1e-3, atol=1e-4)
    weight = sum(r[fact]["weight"] for r in ranks)
    torch.testing.assert_close(weight, alone[fact]["weight"], rtol=1e-3, atol=1e-3)


def test_running_statistics_are_those_of_the_joined_batch(
    ranks: list[dict[str, Facts]], alone: dict[str, Facts]
) -> None:
    for rank in ranks:
        for name, buffer in alone["norm"]["buffers"].items():
            torch.testing.assert_close(rank["norm"]["buffers"][name], buffer, rtol=1e-6, atol=0)


def test_a_measuring_rank_looks_at_its_own_images(ranks: list[dict[str, Facts]]) -> None:
    for rank, part in zip(ranks, norm_input().chunk(WORLD), strict=True):
        torch.testing.assert_close(rank["measured"]["running_mean"], part.mean((0, 2, 3)))
        torch.testing.assert_close(rank["measured"]["running_var"], part.transpose(0, 1).flatten(1).var(1))


def test_recomputed_cells_of_two_ranks_have_the_same_gradients(ranks: list[dict[str, Facts]]) -> None:
    for rank in ranks:
        for kept, recomputed in zip(rank["cell"]["kept"], rank["cell"]["recomputed"], strict=True):
            assert torch.equal(kept, recomputed)


def test_balancing_sees_the_kl_of_all_ranks(ranks: list[dict[str, Facts]]) -> None:
    sizes = torch.tensor([0.5, 1.5]) + 0.01
    for rank in ranks:
        torch.testing.assert_close(rank["reductions"]["balance"], sizes / sizes.mean())


def test_a_model_on_two_ranks_is_the_model_on_one(ranks: list[dict[str, Facts]], alone: dict[str, Facts]) -> None:
    """Loss, KL, gradients and everything that a training pass moves, in float64."""
    one = alone["model"]
    exactly = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(joined(ranks, "model", "kl"), one["kl"], **exactly)
    for two in (rank["model"] for rank in ranks):
        torch.testing.assert_close(two["loss"], one["loss"], **exactly)
        torch.testing.assert_close(two["spectral"], one["spectral"], **exactly)
        assert two["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, **exactly, msg=name)
        for name, value in one["state"].items():
            torch.testing.assert_close(two["state"][name], value, **exactly, msg=name)


def test_ranks_that_differ_are_told_where(ranks: list[dict[str, Facts]]) -> None:
    for rank in ranks:
        same, different, not_a_number = rank["state"]["complaints"]
        assert same == ""
        assert "first at '1.bias'" in different
        assert "first at '1.bias'" in not_a_number
