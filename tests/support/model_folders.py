"""Model folders of tiny models, without a card."""

from pathlib import Path
from typing import Any

import torch
from tiny_run import VERY_DEEP
from tiny_vqvae import FIRST, PRIOR
from torch import nn

from nvae.checkpoints.loading import model_config
from nvae.checkpoints.model_folder import CONFIG, Held, new_model_folder, write, write_weights
from nvae.core.config import yaml_of
from nvae.models.base import Family
from nvae.models.registry import build

FAMILIES: dict[str, dict[str, Any]] = {
    "nvae": {
        "family": "nvae",
        "image_size": 8,
        "encoder_channels": 4,
        "decoder_channels": 4,
        "latent_channels": 2,
        "scales": 2,
        "groups": 2,
        "adaptive_groups": True,
        "flows": 1,
    },
    "very deep": VERY_DEEP,
    "codes": FIRST,
    "prior": {**PRIOR, "codes": "first", "first_stage": FIRST, "levels": PRIOR["levels"] * 2},
}
"""The model sections of a model of each."""


def model_of(section: dict[str, Any]) -> Family[Any]:
    """An untrained model, in eval mode."""
    return build(model_config({"model": section}, "tiny")).eval()


def shared(folder: Path, model: Family[Any], held: Held = "raw", updates: int | None = 7) -> Path:
    """The folder, with the model in it."""
    with new_model_folder(folder) as staged:
        write_weights(staged, model.state_dict(), held, updates)
        write(staged, CONFIG, yaml_of({"model": model.config.model_dump(mode="json")}).encode())
    return folder


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same bits under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
