"""A foreign state dict of another model is refused by the fields of the config that its shapes tell apart."""

from typing import Any

import pytest

from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.models.vdvae import published as published_vdvae
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE
from nvae.models.vqvae import published as published_vqvae
from nvae.models.vqvae.config import VQVAEConfig
from nvae.models.vqvae.model import VQVAE

CODES: dict[str, Any] = {
    "image_size": 16,
    "factors": [2, 2],
    "channels": 8,
    "residual_channels": 4,
    "blocks": 1,
    "quantiser": {"codes": 6, "dim": 4},
    "likelihood": {"components": 1},
}
DEEP: dict[str, Any] = {
    "image_size": 8,
    "width": 8,
    "widths": "1:16",
    "latent_channels": 2,
    "encoder": "8x1,8d8,1x1",
    "decoder": "1x1,8m1",
    "likelihood": {"components": 2},
}


def complaint(module: Any, weights: Any, asked: Any) -> str:
    with pytest.raises(UserError) as told:
        module.from_published(weights, config=asked)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factors": [4]}, "model.factors is 1 levels in the config, 2 levels by the weights"),
        ({"channels": 6}, "model.channels is 6 in the config, 8 by the weights"),
        ({"residual_channels": 5}, "model.residual_channels is 5 in the config, 4 by the weights"),
        ({"blocks": 2}, "model.blocks is 2 in the config, 1 by the weights"),
        ({"quantiser": {"codes": 7, "dim": 4}}, "model.quantiser.codes is 7 in the config, 6 by the weights"),
        ({"quantiser": {"codes": 6, "dim": 3}}, "model.quantiser.dim is 3 in the config, 4 by the weights"),
        ({"image_channels": 1}, "model.image_channels is 1 in the config, 3 by the weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_codes_of_another_network_are_named_by_its_fields(changes: dict[str, Any], sentence: str) -> None:
    weights = published_vqvae.foreign_network(VQVAE(validate(VQVAEConfig, CODES, "codes")).network)
    asked = validate(VQVAEConfig, {**CODES, **changes}, "asked")
    assert sentence in complaint(published_vqvae, weights, asked)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 12}, "model.width is 12 in the config, 8 by the weights"),
        ({"widths": "1:12"}, "model.widths is 12 in the config, 16 by the weights"),
        ({"bottleneck": 0.5}, "model.bottleneck is 0.5 in the config, 0.25 by the weights"),
        ({"latent_channels": 3}, "model.latent_channels is 3 in the config, 2 by the weights"),
        ({"encoder": "8x1,8d8,1x2"}, "model.encoder is 4 blocks in the config, 3 blocks by the weights"),
        ({"decoder": "1x2,8m1"}, "model.decoder is 3 blocks in the config, 2 blocks by the weights"),
        ({"bias_up_to": 1}, "model.bias_up_to is 1 resolutions in the config, 2 resolutions by the weights"),
        ({"likelihood": {"components": 3}}, "model.likelihood is 30 numbers a pixel in the config, 20 numbers a pixel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_very_deep_vae_are_named_by_its_fields(changes: dict[str, Any], sentence: str) -> None:
    weights = published_vdvae.to_published(VDVAE(validate(VDVAEConfig, DEEP, "deep")))
    asked = validate(VDVAEConfig, {**DEEP, **changes}, "asked")
    assert sentence in complaint(published_vdvae, weights, asked)


def test_only_what_differs_is_named() -> None:
    weights = published_vdvae.to_published(VDVAE(validate(VDVAEConfig, DEEP, "deep")))
    asked = validate(VDVAEConfig, {**DEEP, "width": 12}, "asked")
    assert complaint(published_vdvae, weights, asked).count(" in the config, ") == 1


def test_a_tensor_is_named_where_no_field_tells() -> None:
    weights = published_vdvae.to_published(VDVAE(validate(VDVAEConfig, DEEP, "deep")))
    del weights["decoder.gain"]
    assert "it lacks 'decoder.gain'" in complaint(published_vdvae, weights, validate(VDVAEConfig, DEEP, "deep"))
