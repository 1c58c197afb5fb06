"""Short recorded runs of training: a refactoring must not move their losses.

The weights and images are made by formulas of their published names and positions, so that neither the order in which
modules are built nor our names matter. In float64, where another machine's rounding is far below the tolerance.

To record anew after a change that is meant to move them: `python tests/models/test_golden.py`, and say why in the
commit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from first_images import first_images
from torch import Tensor

from nvae.core.config import validate
from nvae.core.randomness import generator, keyed_normal
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.published import tensor_names

FOLDER = Path(__file__).parent / "golden"
STEPS, IMAGES = 5, 4
TINY = {
    "latent_channels": 3,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "encoder_cells": 1,
    "decoder_cells": 1,
    "preprocess_cells": 2,
    "postprocess_cells": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "rgb_two_scales_flow": {
        **TINY,
        "image_size": 16,
        "scales": 2,
        "groups": 2,
        "adaptive_groups": True,
        "flows": 1,
        "likelihood": {"components": 3, "bits": 5},
        "objective": {"spectral": 0.1, "spectral_start": 1.0},
    },
    "binary_vanilla": {
        **TINY,
        "image_size": 8,
        "image_channels": 1,
        "groups": 1,
        "likelihood": {"kind": "bernoulli", "border": 1},
    },
    "grey_without_batch_norm": {
        **TINY,
        "image_size": 8,
        "image_channels": 1,
        "groups": 2,
        "architecture": "res_elu",
        "residual_posterior": False,
        "likelihood": {"components": 2},
    },
}


def center_of(name: str) -> float:
    """Scales and variances of batch norms are around 1, gains of weight norms around e^−1, the rest around 0."""
    if name.endswith("log_weight_norm"):
        return -1.0
    return float(name.endswith(("bn.weight", "bn_act.weight", "conv.1.weight", "running_var")))


def model_of(settings: dict[str, Any]) -> NVAE:
    """A model in float64 whose every tensor is a function of its published name."""
    model = NVAE(validate(NVAEConfig, settings, "golden")).double()
    state = model.state_dict()
    for ours, theirs in tensor_names(model).items():
        tensor = state[ours]
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator("cpu", "golden", theirs)).double()
            value = center_of(theirs) + 0.2 * noise
            tensor.copy_(value.abs() if theirs.endswith("running_var") else value)
    return model.train()


def images_of(config: NVAEConfig) -> Tensor:
    """Bytes i² mod 251 over 255, or their upper bits."""
    count = IMAGES * config.image_channels * config.image_size**2
    byte = torch.arange(count).square() % 251
    x = (byte > 125) if config.likelihood.kind == "bernoulli" else byte / 255
    return x.double().reshape(IMAGES, config.image_channels, config.image_size, config.image_size)


def losses_of(settings: dict[str, Any]) -> list[float]:
    """The loss of consecutive steps, then the negative ELBO in eval mode."""
    model = model_of(settings)
    x = images_of(model.config)
    noise = [n.double() for n in keyed_normal(model.latent_shapes(IMAGES), range(IMAGES), 0, "golden", "cpu")]
    model.begin(first_images(x, noise))
    optimiser = torch.optim.Adamax(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=3e-4)
    losses = []
    for step in range(STEPS):
        loss, _ = model.loss(model(x, noise), step / 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        output = model.eval()(x, noise)
    return [*losses, float((output.reconstruction + output.kl.sum(1)).mean())]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_recorded(name: str) -> None:
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    assert losses_of(RUNS[name]) == pytest.approx(recorded, rel=1e-6)


if __name__ == "__main__":
    for run, given in RUNS.items():
        (FOLDER / f"{run}.json").write_text(json.dumps(losses_of(given), indent=1) + "\n")
