"""Tiny models of every kind: 8×8 pixels, a few thousand parameters."""

from typing import Any

SMALL: dict[str, Any] = {
    "image_size": 8,
    "likelihood": {"components": 2},
    "groups": 2,
    "latent_channels": 3,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "preprocess_cells": 1,
    "postprocess_cells": 1,
    "encoder_cells": 1,
    "decoder_cells": 1,
}
TWO_BLOCKS = {"image_size": 8, "width": 8, "encoder": "8d8,1x1", "decoder": "1x1,8m1", "input_mean": 1, "input_std": 1}
"""A Very Deep VAE as small."""
KINDS: dict[str, dict[str, Any]] = {
    "one scale": {},
    "two scales and a flow": {"scales": 2, "groups": 2, "adaptive_groups": True, "flows": 1},
    "vanilla": {"groups": 1, "flows": 1},
    "binary with a border": {"image_channels": 1, "likelihood": {"kind": "bernoulli", "border": 1}},
    "grey mixture of 5 bits": {"image_channels": 1, "likelihood": {"bits": 5, "components": 1}},
    "normal pixels, plain posterior": {"likelihood": {"kind": "normal"}, "residual_posterior": False},
    "no batch norm": {"architecture": "res_elu"},
}
