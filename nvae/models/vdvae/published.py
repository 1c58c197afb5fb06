"""Checkpoints of the published Very Deep VAE, both ways (spec_vdvae, Published checkpoints).

Their names appear here and nowhere else. Such a checkpoint, of the weights or of their moving average, is a plain state
dict; hyper-parameters come from a config.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...bricks.likelihoods import MixtureEdge
from ...core.errors import UserError
from ..base import Family
from ..config import ModelConfig
from ..renaming import Shapes, load_renamed, numbered, renamed, side_of
from .config import VDVAEConfig
from .model import VDVAE, Block, EncoderBlock, LatentBlock

FAMILY: type[Family[Any]] = VDVAE
CARRIES_CONFIG = False
WRAPPER = "module."
HALLMARK = "encoder.in_conv.weight"


def is_published(content: dict[str, Any]) -> bool:
    """True for the state dict of a checkpoint of the published code."""
    return HALLMARK in content or WRAPPER + HALLMARK in content


def from_published(
    content: dict[str, Any], edge: MixtureEdge = "published", config: ModelConfig | None = None
) -> VDVAE:
    """The model of a published checkpoint and the config of its recipe, in eval mode; its levels are truncated ones.

    Raises UserError without a config, or where weights and config disagree.
    """
    if config is None:
        raise UserError(
            "a published Very Deep VAE carries no hyper-parameters: give the config of its recipe, such as "
            "configs/vdvae_cifar10.yaml"
        )
    if not isinstance(config, VDVAEConfig):
        raise UserError(f"config: its model is of family '{config.family}', the checkpoint is of family 'vdvae'")
    model = VDVAE(config.with_likelihood(edge=edge, grid="truncated"))
    tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in content.items()}
    load_renamed(model, tensors, tensor_names(model), "config", told)
    return model.eval()


def told(shapes: Shapes) -> dict[str, int | str | None]:
    """What published shapes tell of a config."""
    encoder, decoder = "encoder.enc_blocks", "decoder.dec_blocks"
    width, middle = side_of(shapes, "encoder.in_conv.weight", 0), side_of(shapes, f"{encoder}.0.c1.weight", 0)
    blocks = numbered(shapes, decoder)
    widths = dict.fromkeys(side_of(shapes, f"{decoder}.{i}.z_proj.weight", 0) for i in range(blocks))
    return {
        "model.image_channels": side_of(shapes, "encoder.in_conv.weight", 1),
        "model.width": width,
        "model.widths": ", ".join(str(other) for other in widths if other != width) or "none",
        "model.bottleneck": None if width is None or middle is None else f"{middle / width:g}",
        "model.latent_channels": side_of(shapes, f"{decoder}.0.z_proj.weight", 1),
        "model.encoder": f"{numbered(shapes, encoder)} blocks",
        "model.decoder": f"{blocks} blocks",
        "model.bias_up_to": f"{numbered(shapes, 'decoder.bias_xs')} resolutions",
        "model.likelihood": f"{side_of(shapes, 'decoder.out_net.out_conv.weight', 0)} numbers a pixel",
    }


def origin(content: dict[str, Any]) -> dict[str, Any]:
    """Nothing: a state dict says no more."""
    return {}


def content_of(model: VDVAE, origin: Mapping[str, Any], dataset: str | None = None) -> dict[str, Any]:
    """The published state dict of a model. Raises UserError for a data set's name."""
    if dataset is not None:
        raise UserError("--dataset: a published Very Deep VAE does not say what it was trained on, leave it out")
    return to_published(model)


def to_published(model: VDVAE) -> dict[str, Tensor]:
    """The published state dict of a model. Raises UserError for one of classes, which the format has no place for."""
    if model.config.classes:
        raise UserError(f"classes: {model.config.classes}; a published Very Deep VAE has none")
    return renamed(model, tensor_names(model))


def tensor_names(model: VDVAE) -> dict[str, str]:
    """Our name of every tensor -> its published name."""
    ours = {module: name for name, module in model.named_modules()}
    names = {"gain": "decoder.gain", "shift": "decoder.bias"}
    names |= {f"biases.{resolution}": f"decoder.bias_xs.{i}" for i, resolution in enumerate(model.biases)}
    for convolution, prefix in _convolutions(model):
        names |= {f"{ours[convolution]}.{kind}": f"{prefix}.{kind}" for kind in ("weight", "bias")}
    return names


def _convolutions(model: VDVAE) -> Iterator[tuple[nn.Module, str]]:
    """(convolution, published prefix) of all of them."""
    yield model.stem, "encoder.in_conv"
    for i, block in enumerate(model.encoder):
        if isinstance(block, EncoderBlock):
            yield from _inside(block.block, f"encoder.enc_blocks.{i}")
    for i, block in enumerate(model.decoder):
        if isinstance(block, LatentBlock):
            prefix = f"decoder.dec_blocks.{i}"
            yield from _inside(block.posterior, f"{prefix}.enc")
            yield from _inside(block.prior, f"{prefix}.prior")
            yield block.project, f"{prefix}.z_proj"
            yield from _inside(block.residual, f"{prefix}.resnet")
    yield model.head, "decoder.out_net.out_conv"


def _inside(block: Block, prefix: str) -> Iterator[tuple[nn.Module, str]]:
    convolutions = (block.reduce, block.first, block.second, block.expand)
    yield from ((convolution, f"{prefix}.c{i}") for i, convolution in enumerate(convolutions, start=1))
