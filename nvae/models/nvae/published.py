"""Checkpoints of the published NVAE code, both ways (spec §9). Their names appear here and nowhere else.

A published checkpoint is a pickled dict with `args`, an `argparse.Namespace`, and a `state_dict` whose towers are
numbered with one running index over cells, combiners and resampling cells.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError
from torch import nn

from ...bricks.cells import ARCHITECTURES, Cell, RegularOp, Separable, SeparableOp
from ...bricks.convolutions import Conv2d
from ...bricks.groups import LatentGroup
from ...bricks.likelihoods import LikelihoodConfig, MixtureEdge
from ...bricks.normalisation import BatchNorm
from ...bricks.resampling import DownSkip, UpSkip
from ...core.config import user_error
from ...core.errors import UserError
from ..base import Family
from ..config import ModelConfig
from ..renaming import Shapes, load_renamed, numbered, renamed, side_of
from .config import NVAEConfig
from .model import NVAE

FAMILY: type[Family[Any]] = NVAE
CARRIES_CONFIG = True
SAFE_TYPES = (argparse.Namespace,)
REDUNDANT = ".weight_normalized"
GREY = ("mnist", "omniglot")
PADDED = (*GREY, "stacked_mnist")
USUAL_SET = {(1, 32): "mnist", (3, 32): "cifar10", (3, 64): "celeba_64", (3, 256): "celeba_256"}
"""The published set of a number of channels and an image size, where no name is given."""
LEAF_NAMES: dict[type[nn.Module], dict[str, str]] = {
    Conv2d: {"weight": "weight", "bias": "bias", "log_gain": "log_weight_norm"},
    BatchNorm: {k: k for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    nn.Linear: {"weight": "weight", "bias": "bias"},
}


def is_published(content: dict[str, Any]) -> bool:
    """True for the dict of a checkpoint of the published code."""
    args, state = content.get("args"), content.get("state_dict")
    return isinstance(args, argparse.Namespace) and isinstance(state, dict) and all(isinstance(k, str) for k in state)


# ------------------------------------------------------------------------------------------------- hyper-parameters


def config_from_args(args: argparse.Namespace, edge: MixtureEdge = "published") -> NVAEConfig:
    """The config of a published model. Arguments that older checkpoints lack take their old meaning."""
    a: dict[str, Any] = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10, **vars(args)}
    try:
        dataset = str(a["dataset"])
        channels: Literal[1, 3] = 1 if dataset in GREY else 3
        if a["num_preprocess_blocks"] != a["num_postprocess_blocks"]:
            raise UserError("args: num_preprocess_blocks and num_postprocess_blocks differ")
        kind: Literal["bernoulli", "normal", "logistic_mixture"] = "logistic_mixture"
        if channels == 1:
            kind = "bernoulli"
        elif a["num_mixture_dec"] == 1:
            kind = "normal"
        return NVAEConfig(
            image_size=image_size(dataset),
            image_channels=channels,
            likelihood=LikelihoodConfig(
                kind=kind,
                bits=8 if channels == 1 else a["num_x_bits"],
                components=a["num_mixture_dec"],
                edge=edge,
                border=2 if dataset in PADDED else 0,
            ),
            scales=a["num_latent_scales"],
            groups=a["num_groups_per_scale"],
            adaptive_groups=a["ada_groups"],
            min_groups=a["min_groups_per_scale"],
            latent_channels=a["num_latent_per_group"],
            encoder_channels=a["num_channels_enc"],
            decoder_channels=a["num_channels_dec"],
            halvings=a["num_preprocess_blocks"],
            preprocess_cells=a["num_preprocess_cells"],
            postprocess_cells=a["num_postprocess_cells"],
            encoder_cells=a["num_cell_per_cond_enc"],
            decoder_cells=a["num_cell_per_cond_dec"],
            flows=a["num_nf"],
            squeeze_excite=a["use_se"],
            residual_posterior=a["res_dist"],
            architecture=a["arch_instance"],
        )
    except KeyError as error:
        raise UserError(f"args: the published checkpoint lacks {error}") from error
    except ValidationError as error:
        raise user_error(NVAEConfig, error, "args") from error


def image_size(dataset: str) -> int:
    """Side of a data set's images by its published name: the trailing number, 256 for ffhq, else 32 (padded)."""
    if dataset == "ffhq":
        return 256
    suffix = dataset.rpartition("_")[2]
    return int(suffix) if suffix.isdecimal() and len(suffix) < 8 else 32


def args_from_config(config: NVAEConfig, dataset: str) -> argparse.Namespace:
    """The published arguments of a config; `dataset` is the published name of the set.

    Raises UserError for a model that the published format cannot tell, or not with this set.
    """
    likelihood = config.likelihood
    args = argparse.Namespace(
        dataset=dataset,
        use_se=config.squeeze_excite,
        res_dist=config.residual_posterior,
        num_x_bits=likelihood.bits,
        num_latent_scales=config.scales,
        num_groups_per_scale=config.groups,
        num_latent_per_group=config.latent_channels,
        ada_groups=config.adaptive_groups,
        min_groups_per_scale=config.min_groups,
        num_channels_enc=config.encoder_channels,
        num_channels_dec=config.decoder_channels,
        num_preprocess_blocks=config.halvings,
        num_preprocess_cells=config.preprocess_cells,
        num_cell_per_cond_enc=config.encoder_cells,
        num_postprocess_blocks=config.halvings,
        num_postprocess_cells=config.postprocess_cells,
        num_cell_per_cond_dec=config.decoder_cells,
        num_mixture_dec=1 if likelihood.kind == "normal" else likelihood.components,
        num_nf=config.flows,
        arch_instance=config.architecture,
    )
    try:
        ours, theirs = _told(config), _told(config_from_args(args, likelihood.edge))
    except UserError as error:
        raise UserError(f"--dataset: no model is of '{dataset}': {error}") from error
    for field, value in ours.items():
        if value != theirs[field]:
            raise UserError(f"{field}: {value}; a published checkpoint of {dataset} would mean {theirs[field]}")
    return args


def _told(config: NVAEConfig) -> dict[str, Any]:
    """What a published checkpoint says of a model: its config without the objective."""
    likelihood = config.likelihood.model_dump()
    if config.likelihood.kind != "logistic_mixture":
        del likelihood["components"], likelihood["edge"]
    fields = config.model_dump(exclude={"objective", "likelihood", "label_dropout"})
    return fields | {f"likelihood.{name}": value for name, value in likelihood.items()}


# ------------------------------------------------------------------------------------------------------------ names


def _tower_names(model: NVAE) -> Iterator[tuple[nn.Module, str]]:
    """(module, published prefix) of everything that has parameters, cells as a whole."""
    groups = model.latent_groups
    yield model.stem, "stem"
    yield from ((cell, f"pre_process.{i}") for i, cell in enumerate(model.preprocess))
    yield model.top, "enc0.1"
    for i, module in enumerate(_bottom_up(model, groups)):
        yield module, f"enc_tower.{i}.conv" if isinstance(module, Conv2d) else f"enc_tower.{i}"
    for i, module in enumerate(_top_down(model, groups)):
        yield module, f"dec_tower.{i}.conv" if isinstance(module, Conv2d) else f"dec_tower.{i}"
    if model.config.is_vanilla:
        yield groups[0].combine, "stem_decoder"
    for g, group in enumerate(groups):
        yield group.posterior, f"enc_sampler.{g}"
        if g > 0:
            yield group.prior, f"dec_sampler.{g - 1}.1"
        for k, flow in enumerate(group.flow):
            for ours, theirs in (("forwards", "cell1"), ("backwards", "cell2")):
                shift, prefix = getattr(flow, ours), f"nf_cells.{g * len(group.flow) + k}.{theirs}"
                yield shift.expand, f"{prefix}.conv.convz.0"
                yield shift.spatial, f"{prefix}.conv.convz.2"
                yield shift.project, f"{prefix}.mu.conv_0"
    yield from ((cell, f"post_process.{i}") for i, cell in enumerate(model.postprocess))
    yield model.head, "image_conditional.1"


def _bottom_up(model: NVAE, groups: list[LatentGroup]) -> Iterator[nn.Module]:
    """Cells, combiners and down cells in the order of the published encoder tower."""
    for g in reversed(range(len(groups))):
        yield from groups[g].encoder_cells
        if g > 0:
            yield groups[g].merge
            if (joint := model.joint_above(g)) is not None:
                yield model.down[joint]


def _top_down(model: NVAE, groups: list[LatentGroup]) -> Iterator[nn.Module]:
    """Cells, combines and up cells in the order of the published decoder tower."""
    for g, group in enumerate(groups if not model.config.is_vanilla else ()):
        if (joint := model.joint_above(g)) is not None:
            yield model.up[joint]
        yield from group.decoder_cells
        yield group.combine


def _inside(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str]]:
    """(leaf module, published prefix) of a convolution or of what is inside a cell."""
    if not isinstance(module, Cell):
        yield module, prefix
        return
    for j, op in enumerate(module.ops):
        if isinstance(op, RegularOp):
            if op.norm is not None:
                yield op.norm, f"{prefix}._ops.{j}." + ("bn_act" if op.activation == "swish" else "bn.bn")
            yield op.convolution, f"{prefix}._ops.{j}.conv_0"
        elif isinstance(op, SeparableOp):
            at = [f"{prefix}._ops.{j}.conv.{i + op.up}" for i in range(5)]
            yield op.norm, f"{at[0]}.bn"
            yield op.expand, f"{at[1]}.conv.0"
            yield op.expand_norm, f"{at[1]}.conv.1"
            yield op.spatial, f"{at[2]}.conv.0"
            yield op.spatial_norm, f"{at[2]}.conv.1"
            yield op.project, at[3]
            yield op.project_norm, f"{at[4]}.bn"
    if isinstance(module.skip, DownSkip):
        yield from ((conv, f"{prefix}.skip.conv_{i + 1}") for i, conv in enumerate(module.skip.convolutions))
    elif isinstance(module.skip, UpSkip):
        yield module.skip.convolution, f"{prefix}.skip.1"
    if module.squeeze_excite is not None:
        yield module.squeeze_excite.get_submodule("squeeze"), f"{prefix}.se.se.0"
        yield module.squeeze_excite.get_submodule("excite"), f"{prefix}.se.se.2"


def tensor_names(model: NVAE) -> dict[str, str]:
    """Our name of every tensor a published checkpoint carries -> its published name."""
    ours = {module: name for name, module in model.named_modules()}
    names = {"first_state": "prior_ftr0"}
    for tower, tower_prefix in _tower_names(model):
        for leaf, prefix in _inside(tower, tower_prefix):
            table = LEAF_NAMES[type(leaf)]
            own = [*dict(leaf.named_parameters(recurse=False)), *dict(leaf.named_buffers(recurse=False))]
            names |= {f"{ours[leaf]}.{name}": f"{prefix}.{table[name]}" for name in own if name in table}
    return names


# -------------------------------------------------------------------------------------------------------- both ways


def from_published(content: dict[str, Any], edge: MixtureEdge = "published", config: ModelConfig | None = None) -> NVAE:
    """The model of a published checkpoint, in eval mode; `config` is not needed, the checkpoint carries its own.

    Raises UserError where weights and arguments disagree.
    """
    model = NVAE(config_from_args(content["args"], edge))
    tensors = {name: tensor for name, tensor in content["state_dict"].items() if not name.endswith(REDUNDANT)}
    load_renamed(model, tensors, tensor_names(model), "args", told)
    return model.eval()


def told(shapes: Shapes) -> dict[str, int | str | None]:
    """What published shapes tell of arguments; of the cells of the towers only where the groups are as many."""
    groups = numbered(shapes, "enc_sampler")
    latent = side_of(shapes, "enc_sampler.0.weight", 0)
    pixel = side_of(shapes, "image_conditional.1.weight", 0)
    fields: dict[str, int | str | None] = {
        "dataset": f"a set of {side_of(shapes, 'stem.weight', 1)} channels",
        "num_channels_enc": side_of(shapes, "stem.weight", 0),
        "num_channels_dec": side_of(shapes, "image_conditional.1.weight", 1),
        "num_latent_per_group": None if latent is None else latent // 2,
        "num_groups_per_scale, num_latent_scales": f"{groups} groups",
        "num_preprocess_blocks, num_preprocess_cells": f"{numbered(shapes, 'pre_process')} cells",
        "num_postprocess_blocks, num_postprocess_cells": f"{numbered(shapes, 'post_process')} cells",
        "num_nf": numbered(shapes, "nf_cells") // max(groups, 1),
        "use_se": str(any(".se.se." in name for name in shapes)),
        "num_mixture_dec": None if pixel is None else f"{pixel} numbers a pixel",
        "the sides of the dataset's images": side_of(shapes, "prior_ftr0", -1),
    }
    for field, tower in (("num_cell_per_cond_enc", "enc_tower"), ("num_cell_per_cond_dec", "dec_tower")):
        fields[field] = f"{numbered(shapes, tower)} cells and joints with {groups} groups"
    return fields


def origin(content: dict[str, Any]) -> dict[str, Any]:
    """The set a published checkpoint was trained on, and how long."""
    return {"dataset": content["args"].dataset, "epoch": content["epoch"], "global_step": content["global_step"]}


def content_of(model: NVAE, origin: Mapping[str, Any], dataset: str | None = None) -> dict[str, Any]:
    """The published checkpoint of a model: of the set named, or the one it came from, or the usual one of its size."""
    name = dataset or origin.get("dataset") or _usual_set(model.config)
    return to_published(model, name, origin.get("epoch", 0), origin.get("global_step", 0))


def _usual_set(config: NVAEConfig) -> str:
    key = (config.image_channels, config.image_size)
    if key not in USUAL_SET:
        raise UserError(f"--dataset: needed, no published set has {key[0]} × {key[1]} × {key[1]} images by default")
    return USUAL_SET[key]


def to_published(model: NVAE, dataset: str, epoch: int = 0, global_step: int = 0) -> dict[str, Any]:
    """The published checkpoint of a model, redundant entries included; without optimiser state."""
    names = tensor_names(model)
    published = renamed(model, names)
    for name, module in model.named_modules():
        if isinstance(module, Conv2d) and not module.normalised:
            key = names[f"{name}.weight"]
            published[f"{key.removesuffix('.weight')}{REDUNDANT}"] = published[key].clone()
    args = args_from_config(model.config, dataset)
    return {
        "epoch": epoch,
        "global_step": global_step,
        "args": args,
        "arch_instance": _cell_types(args.arch_instance),
        "state_dict": published,
        "optimizer": {},
        "scheduler": {},
        "grad_scalar": {},
    }


def _cell_types(architecture: str) -> dict[str, list[str]]:
    """The published table of an architecture: cell type -> list of its ops."""

    def names(ops: Any) -> list[str]:
        out = []
        for op in ops:
            if isinstance(op, Separable):
                out.append(f"mconv_e{op.expansion}k{op.kernel_size}g{op.groups}")
            else:
                out.append("res_" + ("bn" if op.batch_norm else "") + op.activation + ("5" if op.dilation == 2 else ""))
        return out

    a = ARCHITECTURES[architecture]
    places = {
        "pre": (("normal", "down"), a.preprocess),
        "enc": (("normal", "down"), a.encoder),
        "dec": (("normal", "up"), a.decoder),
        "post": (("normal", "up"), a.postprocess),
    }
    table = {f"{kind}_{place}": names(ops) for place, (kinds, ops) in places.items() for kind in kinds}
    return {**table, "ar_nn": [""]}
