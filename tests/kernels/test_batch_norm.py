"""Batch norms as GPUs divide their work into passes: the same numbers, wherever they are computed."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nvae.bricks import normalisation, squeeze_excite
from nvae.kernels import batch_norm, gated_sum, operations
from nvae.kernels.judging import difference

OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "batch_norm": (batch_norm.batch_norm, normalisation.batch_norm, normalisation._norms),
    "batch_norm_convolution": (
        batch_norm.batch_norm_convolution,
        normalisation.batch_norm_convolution,
        normalisation._norms_before_kernels,
    ),
    "batch_norm_gated_sum": (
        gated_sum.batch_norm_gated_sum,
        squeeze_excite.batch_norm_gated_sum,
        squeeze_excite._gated,
    ),
    "gated_sum": (
        gated_sum.gated_sum,
        squeeze_excite.gated_sum,
        lambda *place: ((skip, x, gate) for skip, x, _, gate in squeeze_excite._gated(*place)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPERATIONS)
def test_passes_of_a_gpu_have_the_values_and_gradients_of_the_plain_function(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "for_a_gpu", lambda x: True)
    function, operation, examples = OPERATIONS[name]

    def plain(*args: Any) -> Any:
        with operations.using("plain"):
            return operation(*args)

    found: list[Sequence[Any]] = list(examples(torch.device("cpu"), dtype))
    assert found
    assert difference(plain, function, found, dtype) == ""


def test_passes_of_a_gpu_err_no_more_where_the_mean_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "for_a_gpu", lambda x: True)
    x = 1000 + torch.randn(4, 3, 8, 8)
    mean, var = batch_norm._moments(x)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0)


def test_a_pass_of_a_gpu_wrong_by_a_percent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "for_a_gpu", lambda x: True)
    right = batch_norm._gradient_sums

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        sums, means = right(*args)
        return sums, 1.01 * means

    monkeypatch.setattr(batch_norm, "_gradient_sums", wrong)
    examples = list(normalisation._norms(torch.device("cpu"), torch.float64))
    with operations.using("plain"):
        assert "differs" in difference(normalisation.batch_norm, batch_norm.batch_norm, examples, torch.float64)
