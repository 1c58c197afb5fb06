"""Gradients between two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from nvae.core import distributed
from nvae.training.exchange import parallel

pytestmark = pytest.mark.slow
INPUTS = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
"""Of each rank, three rows."""


def gradient(model: nn.Module, layer: nn.Linear, rows: Tensor) -> Tensor:
    model(rows).square().sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


def layer_of_all() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 5)


def exchanged(folder: Path) -> None:
    """Each rank's gradient after the exchange, by its type, into a file of its own."""
    rank, found = distributed.rank(), {}
    kind: Any
    for kind in ("fp32", "bf16"):
        layer = layer_of_all()
        found[kind] = gradient(parallel(layer, torch.device("cpu"), kind), layer, INPUTS[rank])
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, exchanged, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def own() -> list[Tensor]:
    """The gradient of each rank alone."""
    layers = [layer_of_all() for _ in INPUTS]
    return [gradient(layer, layer, rows) for layer, rows in zip(layers, INPUTS, strict=True)]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_ranks_hold_the_same_afterwards(kind: str, ranks: list[dict[str, Tensor]]) -> None:
    assert torch.equal(ranks[0][kind], ranks[1][kind])


def test_it_is_the_mean(ranks: list[dict[str, Tensor]], own: list[Tensor]) -> None:
    torch.testing.assert_close(ranks[0]["fp32"], (own[0] + own[1]) / 2)


def test_in_bf16_it_is_the_rounded_mean_of_what_was_rounded(ranks: list[dict[str, Tensor]], own: list[Tensor]) -> None:
    halves = [gradient.bfloat16() / 2 for gradient in own]
    assert torch.equal(ranks[0]["bf16"], (halves[0] + halves[1]).float())
    assert not torch.equal(ranks[0]["bf16"], ranks[0]["fp32"])


def test_one_process_has_nobody_to_exchange_with() -> None:
    layer = nn.Linear(2, 2)
    assert parallel(layer, torch.device("cpu"), "fp32") is layer
