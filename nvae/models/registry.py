"""The families by name. A new one is a line here, or `package.module:Class` in a config."""

import importlib
import sys
from typing import Any

from ..core.config import nearest
from ..core.errors import UserError
from .base import Family
from .config import ModelConfig

FAMILIES = {
    "nvae": "nvae.models.nvae.model:NVAE",
    "vdvae": "nvae.models.vdvae.model:VDVAE",
    "vqvae": "nvae.models.vqvae.model:VQVAE",
    "vqvae_prior": "nvae.models.vqvae.prior:VQVAEPrior",
}


def family(name: str) -> type[Family[Any]]:
    """The class of a family. Raises UserError when there is none of that name."""
    if not isinstance(name, str):
        raise UserError(f"model.family: takes a name, found {name!r}")
    path = FAMILIES.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        raise UserError(f"model.family: unknown family '{name}'{nearest(name, FAMILIES)}")
    if module_name.partition(".")[0] in sys.stdlib_module_names:  # some of which do something when imported
        raise UserError(f"model.family: '{name}' is a part of Python, no module of yours")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"model.family: '{name}' cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Family) and hasattr(found, "config_type")):
        raise UserError(f"model.family: '{name}' is not a Family (nvae.models.base)")
    return found


def build(config: ModelConfig) -> Family[Any]:
    """A fresh model of the family its config names."""
    return family(config.family)(config)
