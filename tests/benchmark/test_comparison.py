"""The table of operations on this machine, and an implementation that is wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nvae.benchmark.comparison import comparisons
from nvae.bricks import squeeze_excite  # noqa: F401 - brings an operation
from nvae.kernels import operations

CPU = torch.device("cpu")


@pytest.fixture
def only_gated_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    names = operations.TABLE["gated_sum"]
    monkeypatch.setattr(operations, "_operations", {"gated_sum": operations._operations["gated_sum"]})
    monkeypatch.setitem(operations.TABLE, "gated_sum", names)


@pytest.mark.usefixtures("only_gated_sum")
def test_what_is_right_is_timed_beside_the_plain_function() -> None:
    (found,) = comparisons(CPU, [torch.float32])
    assert not found.attention
    assert found.figures["float32"].keys() == {"sound", "milliseconds", "plain_milliseconds"}


@pytest.mark.usefixtures("only_gated_sum")
def test_what_is_wrong_needs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Tensor:
        return operations._operations["gated_sum"].plain(*args) + 1

    monkeypatch.setattr(operations.Operation, "implementation", lambda self, name: wrong)
    (found,) = comparisons(CPU, [torch.float32])
    assert found.attention and "differs from the plain computation" in found.words
