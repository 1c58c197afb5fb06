"""Converting checkpoints between the published format and ours (spec §9)."""

from pathlib import Path

import torch

from .checkpoint import atomic_file, is_ours, read_safely, save_checkpoint
from .config import UserError
from .loading import checkpoint_file, load_model
from .models.nvae import NVAE, NVAEConfig
from .published import SAFE_TYPES, from_published, is_published, to_published

USUAL_SET = {(1, 32): "mnist", (3, 32): "cifar10", (3, 64): "celeba_64", (3, 256): "celeba_256"}
"""The published set of a number of channels and an image size, where no name is given."""


def convert(source: Path, target: Path, dataset: str | None = None) -> str:
    """Writes `target` in the other format than `source` is in; returns a line that says what was done.

    A converted published checkpoint keeps the published mixture edge. Raises UserError.
    """
    content = read_safely(checkpoint_file(source), SAFE_TYPES)
    if is_published(content):
        model = from_published(content)
        origin = {"dataset": content["args"].dataset, "epoch": content["epoch"], "global_step": content["global_step"]}
        config = {"model": model.config.model_dump(mode="json")}
        save_checkpoint(target, {"config": config, "model": model.state_dict(), "ema": None, "published": origin})
        return f"{target}: ours, from a published checkpoint; mixture edge: {model.config.likelihood.edge}"
    if not is_ours(content):
        raise UserError(f"{source}: neither a published NVAE checkpoint nor one of ours")
    ours = load_model(source)
    if not isinstance(ours, NVAE):
        raise UserError(f"{source}: the published NVAE format holds NVAE models only, found {type(ours).__name__}")
    origin = content.get("published") or {}
    name = dataset or origin.get("dataset") or _usual_set(ours.config)
    published = to_published(ours, name, origin.get("epoch", 0), origin.get("global_step", 0))
    with atomic_file(target) as file:
        torch.save(published, file)
    return f"{target}: a published checkpoint of {name}, from ours"


def _usual_set(config: NVAEConfig) -> str:
    key = (config.image_channels, config.image_size)
    if key not in USUAL_SET:
        raise UserError(f"--dataset: needed, no published set has {key[0]} × {key[1]} × {key[1]} images by default")
    return USUAL_SET[key]
