"""Compiled parts, kept by counts: graphs, breaks, recompilations; and the same numbers as uncompiled."""

from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from counting import Operators
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nvae.bricks.cells import ARCHITECTURES, Cell
from nvae.core.config import validate
from nvae.evaluation.bounds import Evaluator
from nvae.kernels import dynamo, fusion, operations
from nvae.kernels.fusion import compile_each
from nvae.models.base import Family
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE

OPERATORS_PER_GROUP = 563
"""Of an update, with a cell in each tower: what it was when this was last looked at."""


@pytest.fixture(autouse=True)
def uncounted() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch({dynamo.RECOMPILE_LIMIT: 8, dynamo.FAIL_AT_LIMIT: False}):
        yield
    torch._dynamo.reset()


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as ever, and run by PyTorch's operators: what counts needs no compiler."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


def updates(model: Family[Any], count: int) -> list[int]:
    """The number of graphs after each of `count` updates."""
    optimiser, graphs = torch.optim.SGD(model.parameters(), lr=1e-4), []
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size)
    for _ in range(count):
        optimiser.zero_grad()
        model.loss(model(images), 1.0)[0].backward()
        optimiser.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("recompute", ["none", "cells"])
def test_there_is_a_graph_for_each_kind_of_part_whatever_the_depth(
    tiny_config: Callable[..., NVAEConfig], recompute: Any
) -> None:
    found = []
    for groups in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        model = NVAE(tiny_config(groups=groups, flows=1, decoder_cells=2)).train()
        model.set_recomputation(recompute)
        compile_each(model.parts())
        graphs = updates(model, 4)
        assert graphs[0] > 0
        assert graphs[1] == graphs[-1], "recompiled after the second update"
        found.append(graphs[-1])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_no_graph_breaks(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = NVAE(tiny_config(scales=2, flows=1)).train()
    compile_each(model.parts())
    updates(model, 2)
    assert dict(counters["graph_break"]) == {}


@pytest.mark.usefixtures("without_code")
@pytest.mark.slow
def test_too_many_kinds_are_an_error_and_not_a_return_to_uncompiled_code(
    tiny_config: Callable[..., NVAEConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "KINDS_OF_CALLS", 2)
    model = NVAE(tiny_config(scales=2)).train()
    compile_each(model.parts())
    with pytest.raises(Exception, match="limit"):
        updates(model, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_a_model_for_inference_is_free_of_what_was_compiled(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = NVAE(tiny_config()).train()
    compile_each(model.parts())
    updates(model, 1)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        model.for_inference()(torch.rand(2, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("place", ["decoder", "encoder"])
def test_a_compiled_cell_keeps_no_more_for_the_backward_pass(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler divides what is computed between both passes as it will: here as it would for a GPU."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition"))
    ops = getattr(ARCHITECTURES["res_mbconv"], place)
    cell = Cell(ops, 16, "same", squeeze_excite=True)
    x = torch.randn(4, 16, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    uncompiled = bytes_kept(cell, x)
    compile_each([cell])
    assert bytes_kept(cell, x) <= 1.01 * uncompiled


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradients_of_gates_are_float32_under_autocast(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would run the backward pass in the forward pass's types."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    cell = Cell((), 16, "same", squeeze_excite=True)
    x, found = torch.randn(4, 16, 16, 16), []
    with operations.using(kernels):
        for _ in range(2):
            cell.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = cell(x)
            y.square().sum().backward()
            found.append([parameter.grad for parameter in cell.parameters()])
            compile_each([cell])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def bytes_kept(module: nn.Module, x: Tensor) -> int:
    """What is kept for the backward pass of an update in bf16."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        count = sum(kept.values())
    y.float().sum().backward()
    return count


@pytest.mark.slow
def test_compiled_code_says_the_same(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = NVAE(tiny_config(scales=2, flows=1)).eval()
    images, noise = torch.rand(2, 3, 8, 8), [torch.randn(shape) for shape in model.latent_shapes(2)]
    with torch.no_grad():
        expected = model(images, noise)
        compile_each(model.parts())
        found = model(images, noise)
    torch.testing.assert_close(found.likelihood.params, expected.likelihood.params, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_weight, expected.log_weight, rtol=1e-5, atol=1e-3)


def very_deep(decoder: str) -> VDVAE:
    section = {"image_size": 8, "likelihood": {"components": 2}, "width": 8, "input_mean": 120.0, "input_std": 64.0}
    return VDVAE(validate(VDVAEConfig, {**section, "encoder": "8d8,1x1", "decoder": decoder}, "very deep"))


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_a_very_deep_vae_has_a_graph_for_each_kind_of_block_in_training_and_in_evaluation() -> None:
    """Recomputed blocks are the harder kind."""
    found = []
    for decoder in ("1x2,8m1", "1x6,8m1"):
        torch._dynamo.reset()
        counters.clear()
        model = very_deep(decoder).train()
        model.set_recomputation("cells")
        compile_each(model.parts())
        graphs = updates(model, 4)
        assert graphs[1] == graphs[-1], "recompiled after the second update"
        Evaluator(model.eval().for_inference(), samples=2).measure(torch.rand(2, 3, 8, 8), [0, 1])
        found.append((graphs[-1], counters["stats"]["unique_graphs"]))
        assert dict(counters["graph_break"]) == {}
    assert found[0] == found[1] and 0 < found[0][0] < found[0][1]


@pytest.mark.slow
def test_a_compiled_very_deep_vae_says_the_same() -> None:
    model = very_deep("1x1,8m1").eval()
    images, noise = torch.rand(2, 3, 8, 8), [torch.randn(shape) for shape in model.latent_shapes(2)]
    with torch.no_grad():
        expected = model.decode(model.encode(images), noise)
        compile_each(model.parts())
        found = model.decode(model.encode(images), noise)
    torch.testing.assert_close(found.likelihood.params, expected.likelihood.params, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_weight, expected.log_weight, rtol=1e-5, atol=1e-3)


def test_an_update_takes_no_more_operators_than_it_did(tiny_config: Callable[..., NVAEConfig]) -> None:
    """Launches are what small models and GPUs wait for. Lower the figure where a change saves some."""

    def operators(groups: int) -> int:
        model = NVAE(tiny_config(groups=groups)).train()
        images = torch.rand(2, 3, 8, 8)
        model.loss(model(images), 1.0)[0].backward()  # the first power iterations are more
        with Operators() as counted:
            model.loss(model(images), 1.0)[0].backward()
        return counted.count

    assert operators(6) - operators(5) <= OPERATORS_PER_GROUP
