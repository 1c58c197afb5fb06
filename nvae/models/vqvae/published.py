"""State dicts of public VQ-VAE codes, both ways (spec_vqvae §3, §4).

Their names appear here and nowhere else: of one level, Sonnet's example in PyTorch's layout; of two, rosinality's
network; of three, its bricks; and its PixelSNAIL. Codebooks and sums are (D, K) there, (K, D) here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...bricks.causal import GatedBlock
from ...bricks.likelihoods import MixtureEdge
from ...bricks.quantiser import AveragedQuantiser
from ...core.errors import UserError
from ..base import Family
from ..config import ModelConfig
from ..renaming import Shapes, load_renamed, renamed, side_of
from .config import VQVAEConfig
from .model import VQVAE
from .network import Down, Level, Network, ResidualBlock, Up
from .pixelsnail import PixelSNAIL

Pairs = Iterator[tuple[nn.Module, str]]
"""Modules with their foreign prefixes."""
PLACES = "background"
"""Where each position is: a buffer of that PixelSNAIL, which the shape of the map gives."""
MATRICES = ("codebook", "embed", "embed_avg")
"""What is (D, K) there."""


FAMILY: type[Family[Any]] = VQVAE
CARRIES_CONFIG = False
HALLMARKS = ("to_vq.weight", "quantize_conv_t.weight", "conv_3.weight")
"""The convolution before the top's codes, of one, two and three levels."""
CODEBOOKS = ("codebook", "quantize_t.embed", "q_3.embed")
IMAGES = ("encoder.conv1.weight", "enc_b.blocks.0.weight", "enc_1.blocks.0.weight")
"""What sees the image."""
WIDENED = re.compile(r"(encoder|enc_t|enc_3)\.blocks?\.\d+\.(conv3|conv\.1)\.weight")
"""What widens the residual blocks of the top's encoder."""


def is_published(content: dict[str, Any]) -> bool:
    """True for the state dict of such a network."""
    return any(name in content for name in HALLMARKS)


def from_published(
    content: dict[str, Any], edge: MixtureEdge = "published", config: ModelConfig | None = None
) -> VQVAE:
    """The model of a foreign state dict and the config of its recipe, in eval mode; its codebooks average as theirs do.

    Raises UserError without a config, or where weights and config disagree.
    """
    if config is None:
        raise UserError(
            "a public VQ-VAE carries no hyper-parameters: give the config of its recipe, such as "
            "configs/vqvae2_ffhq_256.yaml"
        )
    if not isinstance(config, VQVAEConfig):
        raise UserError(f"config: its model is of family '{config.family}', the checkpoint is of family 'vqvae'")
    _require_public_factors(config)
    if any(name.averages for name in FOREIGN[len(config.factors)]):
        quantiser = config.quantiser.model_copy(update={"averages": "from_zero", "restart": 0.0})
        config = config.model_copy(update={"quantiser": quantiser})
    model = VQVAE(config)
    load_network(model.network, content)
    return model.eval()


def origin(content: dict[str, Any]) -> dict[str, Any]:
    """Nothing: a state dict says no more."""
    return {}


def content_of(model: VQVAE, origin: Mapping[str, Any], dataset: str | None = None) -> dict[str, Any]:
    """The foreign state dict of a model. Raises UserError for a data set's name, and for one of more levels."""
    if dataset is not None:
        raise UserError("--dataset: a public VQ-VAE does not say what it was trained on, leave it out")
    _require_public_factors(model.config)
    return foreign_network(model.network)


def _require_public_factors(config: VQVAEConfig) -> None:
    """Raises UserError for levels that no public network has."""
    _, *between = config.factors
    if len(config.factors) not in FOREIGN or set(between) - {2}:
        raise UserError(
            f"model.factors: is {list(config.factors)}; public networks have 1 to 3 levels, each after the first "
            "half as large as the one before"
        )


def load_network(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Gives a network the tensors of a foreign state dict. Raises UserError where they are of another one."""
    load_renamed(network, _transposed(tensors), network_names(network), "config", told)


def told(shapes: Shapes) -> dict[str, int | str | None]:
    """What the shapes of a network's tensors tell of its config, codebooks (K, D)."""
    for levels, (hallmark, codebook, image) in enumerate(zip(HALLMARKS, CODEBOOKS, IMAGES, strict=True), start=1):
        if hallmark in shapes:
            widened = [shape for name, shape in shapes.items() if WIDENED.fullmatch(name)]
            return {
                "model.factors": f"{levels} levels",
                "model.image_channels": side_of(shapes, image, 1),
                "model.channels": side_of(shapes, hallmark, 1),
                "model.residual_channels": widened[0][0] if widened else None,
                "model.blocks": len(widened),
                "model.quantiser.codes": side_of(shapes, codebook, 0),
                "model.quantiser.dim": side_of(shapes, codebook, 1),
            }
    return {}


def foreign_network(network: Network) -> dict[str, Tensor]:
    """The foreign state dict of a network of one, two or three levels; averages without the bias of their start."""
    tensors = renamed(network, network_names(network))
    for level, name in zip(network.top_down(), FOREIGN[len(network.levels)], strict=True):
        if name.averages and isinstance(level.quantiser, AveragedQuantiser):
            size, total = level.quantiser.averages()
            tensors |= {f"{name.quantiser}.cluster_size": size, f"{name.quantiser}.embed_avg": total}
    return _transposed(tensors)


def load_prior(prior: PixelSNAIL, tensors: Mapping[str, Tensor]) -> None:
    """As `load_network`, for a prior."""
    learned = {name: tensor for name, tensor in tensors.items() if name != PLACES}
    load_renamed(prior, learned, prior_names(prior), "config", lambda shapes: {})


def foreign_prior(prior: PixelSNAIL) -> dict[str, Tensor]:
    """The foreign state dict of a prior."""
    return {PLACES: prior.places.clone()} | renamed(prior, prior_names(prior))


def _transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.T.contiguous() if name.split(".")[-1] in MATRICES else t for name, t in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class LevelNames:
    """The parts of a level there."""

    encoder: str
    project: str
    quantiser: str
    decoder: str
    enlarge: tuple[str, ...] = ()
    averages: bool = True
    """Whether counts and sums are kept, too."""


FOREIGN = {
    1: (LevelNames("encoder", "to_vq", "", "decoder", averages=False),),
    2: (
        LevelNames("enc_t", "quantize_conv_t", "quantize_t", "dec_t", ("upsample_t",)),
        LevelNames("enc_b", "quantize_conv_b", "quantize_b", "dec"),
    ),
    3: (
        LevelNames("enc_3", "conv_3", "q_3", "dec_3", ("up_3_to_2",)),
        LevelNames("enc_2", "conv_2", "q_2", "dec_2", ("up_3_to_1", "up_2_to_1")),
        LevelNames("enc_1", "conv_1", "q_1", "dec_1"),
    ),
}
"""By the number of levels, top-down."""


def network_names(network: Network) -> dict[str, str]:
    """Our name of every tensor that the foreign network has -> its name there."""
    levels = network.top_down()
    ours = {module: name for name, module in network.named_modules()}
    names: dict[str, str] = {}
    for level, foreign in zip(levels, FOREIGN[len(levels)], strict=True):
        for convolution, prefix in _of_level(level, foreign):
            names |= {f"{ours[convolution]}.{kind}": f"{prefix}.{kind}" for kind in ("weight", "bias")}
        quantiser = ours[level.quantiser]
        names[f"{quantiser}.codebook"] = f"{foreign.quantiser}.embed" if foreign.quantiser else "codebook"
        if foreign.averages:
            names[f"{quantiser}.size"] = f"{foreign.quantiser}.cluster_size"
            names[f"{quantiser}.total"] = f"{foreign.quantiser}.embed_avg"
    return names


def _of_level(level: Level, foreign: LevelNames) -> Pairs:
    sonnet = not foreign.averages
    yield from (_sonnet_down if sonnet else _down)(level.encoder, foreign.encoder)
    yield level.project, foreign.project
    yield from (_sonnet_up if sonnet else _up)(level.decoder, foreign.decoder)
    for enlarge, prefix in zip(level.enlarge, foreign.enlarge, strict=True):
        assert isinstance(enlarge, nn.Sequential) and len(enlarge) == 1, "a factor of 2 between levels"
        yield enlarge[0], prefix


def _down(down: Down, prefix: str) -> Pairs:
    """A sequence in which ReLUs count."""
    last = 2 * len(down.halvings)
    for i, halving in enumerate(down.halvings):
        yield halving, f"{prefix}.blocks.{2 * i}"
    yield down.last, f"{prefix}.blocks.{last}"
    yield from _blocks(down.blocks, f"{prefix}.blocks", last + 1, ("conv.1", "conv.3"))


def _up(up: Up, prefix: str) -> Pairs:
    yield up.first, f"{prefix}.blocks.0"
    yield from _blocks(up.blocks, f"{prefix}.blocks", 1, ("conv.1", "conv.3"))
    for i, doubling in enumerate(up.doublings):
        yield doubling, f"{prefix}.blocks.{len(up.blocks) + 2 + 2 * i}"


def _sonnet_down(down: Down, prefix: str) -> Pairs:
    for i, convolution in enumerate([*down.halvings, down.last], start=1):
        yield convolution, f"{prefix}.conv{i}"
    yield from _blocks(down.blocks, f"{prefix}.block", 0, ("conv3", "conv1"))


def _sonnet_up(up: Up, prefix: str) -> Pairs:
    yield up.first, f"{prefix}.conv1"
    yield from _blocks(up.blocks, f"{prefix}.block", 0, ("conv3", "conv1"))
    for i, doubling in enumerate(up.doublings, start=1):
        yield doubling, f"{prefix}.up{i}"


def _blocks(blocks: nn.Sequential, prefix: str, first: int, inside: tuple[str, str]) -> Pairs:
    for i, block in enumerate(blocks, start=first):
        assert isinstance(block, ResidualBlock)
        yield block.widen, f"{prefix}.{i}.{inside[0]}"
        yield block.back, f"{prefix}.{i}.{inside[1]}"


# --------------------------------------------------------------------------------------------------------------- priors


def prior_names(prior: PixelSNAIL) -> dict[str, str]:
    """Our name of every tensor -> its name there."""
    kinds = {"gain": "weight_g", "direction": "weight_v", "bias": "bias"}
    ours = {module: name for name, module in prior.named_modules()}
    names: dict[str, str] = {}
    for module, prefix in _of_prior(prior):
        names |= {f"{ours[module]}.{kind}": f"{prefix}.{kinds[kind]}" for kind, _ in module.named_parameters()}
    return names


def _of_prior(prior: PixelSNAIL) -> Pairs:
    yield prior.context.over, "horizontal.conv.conv"
    yield prior.context.left, "vertical.conv.conv"
    for i, block in enumerate(prior.attention_blocks()):
        for j, gated in enumerate(block.gated()):
            yield from _gated(gated, f"blocks.{i}.resblocks.{j}", "conv.conv")
        if block.attends:
            yield from _gated(block.query, f"blocks.{i}.query_resblock")
            yield from _gated(block.key, f"blocks.{i}.key_resblock")
            for kind in ("query", "key", "value"):
                yield getattr(block.attention, kind), f"blocks.{i}.causal_attention.{kind}"
            yield from _gated(block.out, f"blocks.{i}.out_resblock")
        else:
            yield block.mix, f"blocks.{i}.out.conv"
    for stack in prior.condition_stacks():
        yield stack.first, "cond_resnet.blocks.0.conv"
        for j, gated in enumerate(stack.gated(), start=1):
            yield from _gated(gated, f"cond_resnet.blocks.{j}")
    for i, gated in enumerate(prior.last_blocks()):
        yield from _gated(gated, f"out.{i}")
    yield prior.logits, f"out.{len(prior.out) + 1}.conv"


def _gated(block: GatedBlock, prefix: str, convolution: str = "conv") -> Pairs:
    yield block.first, f"{prefix}.conv1.{convolution}"
    yield block.second, f"{prefix}.conv2.{convolution}"
    if block.auxiliary is not None:
        yield block.auxiliary, f"{prefix}.aux_conv.conv"
    if block.condition is not None:
        yield block.condition, f"{prefix}.condition.conv"
