"""Models that compress, of a few thousand parameters, and images for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kinds import TWO_BLOCKS
from tiny_run import TINY
from tiny_vqvae import FIRST, IMAGES, SNAIL

from nvae.codec.coders import Coder
from nvae.codec.stack import WORD_BITS, Stack
from nvae.core.config import validate
from nvae.models.base import Family
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE
from nvae.models.vqvae.config import VQVAEConfig, VQVAEPriorConfig
from nvae.models.vqvae.model import VQVAE
from nvae.models.vqvae.prior import VQVAEPrior

COLOUR: dict[str, Any] = {"image_channels": 3, "likelihood": {"kind": "logistic_mixture", "components": 2}}


def tiny_nvae(**changes: Any) -> Family[Any]:
    """Of two groups, binary images of 8×8 unless told otherwise; its weights far enough from their start to matter."""
    return stirred(NVAE(validate(NVAEConfig, {**TINY["model"], **changes}, "tiny")))


def stirred(model: Family[Any], shrunk: float = 1.0) -> Family[Any]:
    """With weights that make latents and pixels depend on each other, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter *= shrunk
    return model.eval()


MODELS: dict[str, Callable[[], Family[Any]]] = {
    "nvae, binary": tiny_nvae,
    "nvae, grey": lambda: tiny_nvae(**{**COLOUR, "image_channels": 1}),
    "nvae, colour": lambda: tiny_nvae(**COLOUR),
    "nvae, two scales and a border": lambda: tiny_nvae(scales=2, likelihood={"kind": "bernoulli", "border": 1}),
    "very deep": lambda: stirred(VDVAE(validate(VDVAEConfig, {**TWO_BLOCKS, **COLOUR}, "tiny")), shrunk=0.5),
    "codes": lambda: stirred(VQVAE(validate(VQVAEConfig, FIRST, "tiny"))),
    "codes with a prior": lambda: tiny_prior(),
}
"""Every kind that compresses."""


def tiny_prior() -> Family[Any]:
    """Priors of two levels of codes over a first stage, none of them trained."""
    config = {**IMAGES, "family": "vqvae_prior", "levels": [SNAIL, SNAIL], "codes": "nowhere", "first_stage": FIRST}
    return stirred(VQVAEPrior(validate(VQVAEPriorConfig, config, "tiny")))


def images_for(coder: Coder, count: int, seed: int = 0) -> np.ndarray:
    """(count, C, S, S) levels at random."""
    shape = (count, coder.colours, coder.size, coder.size)
    return np.random.default_rng(seed).integers(0, coder.levels + 1, shape)


def kept(stacks: list[Stack]) -> list[Stack]:
    """As a file keeps them."""
    return [Stack(stack.words(), is_new=False) for stack in stacks]


def bits_spent(stacks: list[Stack]) -> int:
    """Without those that the stacks began with."""
    return sum(WORD_BITS * (len(stack.words()) - stack.begun) for stack in stacks)
