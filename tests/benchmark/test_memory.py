"""Counting a step's memory: against sizes known by hand, and the same on real tensors as on fake ones."""

import re
from collections.abc import Callable

import pytest
import torch
from places import ROOT
from torch import nn

from nvae.benchmark.memory import LiveBytes, saved_bytes, step_memory
from nvae.checkpoints.loading import config_from
from nvae.core.config import validate
from nvae.models.base import Recomputation
from nvae.models.nvae.config import NVAEConfig
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE

MODEL = validate(
    VDVAEConfig,
    {
        "image_size": 16,
        "width": 16,
        "latent_channels": 4,
        "likelihood": {"components": 1},
        "encoder": "16x6,16d4,4x1",
        "decoder": "4x2,16m4,16x6",
        "input_mean": 120,
        "input_std": 64,
    },
    "test",
)


MODES: list[tuple[torch.dtype | None, Recomputation]] = [
    (None, "none"),
    (None, "cells"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "cells"),
]
"""The columns of the table in docs/vdvae.md."""


def test_storage_counts_once_while_a_tensor_uses_it_and_weights_never() -> None:
    layer = nn.Linear(4, 4)
    with LiveBytes(apart=layer) as count:
        a = torch.zeros(10)
        b = a[2:4]
        view = layer.weight[0]
        assert count.live == 40
        del a
        assert count.live == 40
        del b
        assert count.live == 0
        assert count.peak == 40
    assert view.shape == (4,)


def test_a_linear_layer_and_gelu_keep_their_inputs() -> None:
    layer = nn.Linear(8, 8)
    x = torch.zeros(4, 8)
    with LiveBytes(apart=layer) as count:
        loss = nn.functional.gelu(layer(x)).sum()
        assert count.live == 4 * (4 * 8 + 1)  # GELU's input and the sum; x was made outside
        loss.backward()
    assert count.live == 4 * (8 * 8 + 8 + 1)  # gradients and the sum


def test_fake_tensors_count_as_real_ones() -> None:
    model = VDVAE(MODEL)
    images, noise = torch.zeros(2, 3, 16, 16), [torch.zeros(shape) for shape in model.latent_shapes(2)]
    with LiveBytes(apart=model) as count:
        output = model(images, noise)
        loss, metrics = model.loss(output, 1.0)
        kept = count.live
    assert loss.requires_grad and metrics
    assert step_memory(MODEL, batch=2).kept == kept


@pytest.mark.slow
def test_autograds_own_account_is_what_an_image_keeps(tiny_config: Callable[..., NVAEConfig]) -> None:
    """Counted by hooks and as living storage; the output is alive as well."""
    config = tiny_config(objective={"spectral": 0})
    hooked, living = (saved_bytes(config, n) for n in (2, 4)), (step_memory(config, n).kept for n in (2, 4))
    (two, four), (living_two, living_four) = hooked, living
    assert 0.9 * (living_four - living_two) < four - two <= living_four - living_two


@pytest.mark.slow
def test_recomputation_and_mixed_precision_keep_less() -> None:
    everything = step_memory(MODEL, batch=4)
    assert step_memory(MODEL, batch=4, recompute="cells").kept < 0.5 * everything.kept
    assert step_memory(MODEL, batch=4, precision=torch.bfloat16).kept < 0.8 * everything.kept


@pytest.mark.slow
def test_memory_grows_in_proportion_to_the_batch() -> None:
    two, three, four = (step_memory(MODEL, batch).kept for batch in (2, 3, 4))
    assert four - three == three - two
    assert 1.9 * two < four <= 2 * two


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["vdvae_cifar10", "vdvae_ffhq_1024"])
def test_the_page_tells_the_memory_of_a_recipe(recipe: str) -> None:
    row = re.search(rf"^\| `{recipe}` \|(.*)\|$", (ROOT / "docs" / "vdvae.md").read_text()[-3000:], re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[1].split("|")]
    config, batch = config_from(ROOT / "configs" / f"{recipe}.yaml"), int(cells[0])
    for cell, (precision, mode) in zip(cells[1:], MODES, strict=True):
        found = step_memory(config, batch, mode, precision)
        assert cell == f"{found.kept / 2**20:.0f}; {found.peak / 2**20:.0f}"
