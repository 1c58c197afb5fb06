"""Published NVAE checkpoints: hyper-parameters, names, both ways, what does not fit."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvae.bricks.cells import ARCHITECTURES
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.published import (
    args_from_config,
    config_from_args,
    from_published,
    image_size,
    tensor_names,
    to_published,
)

Make = Callable[..., NVAEConfig]


def args(**changes: Any) -> argparse.Namespace:
    """Those of a small published model."""
    fields: dict[str, Any] = {
        "dataset": "cifar10",
        "use_se": True,
        "res_dist": True,
        "num_x_bits": 8,
        "num_latent_scales": 2,
        "num_groups_per_scale": 4,
        "num_latent_per_group": 3,
        "ada_groups": True,
        "min_groups_per_scale": 1,
        "num_channels_enc": 4,
        "num_channels_dec": 8,
        "num_preprocess_blocks": 1,
        "num_preprocess_cells": 2,
        "num_cell_per_cond_enc": 1,
        "num_postprocess_blocks": 1,
        "num_postprocess_cells": 3,
        "num_cell_per_cond_dec": 2,
        "num_mixture_dec": 5,
        "num_nf": 1,
        "arch_instance": "res_mbconv",
    }
    return argparse.Namespace(**fields | changes)


def checkpoint(config: NVAEConfig, dataset: str = "cifar10") -> dict[str, Any]:
    return to_published(NVAE(config), dataset)


def complaint(call: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*given)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- hyper-parameters


def test_arguments_become_the_fields_of_the_config() -> None:
    config = config_from_args(args())
    assert config.model_dump(exclude={"objective", "likelihood", "label_dropout"}) == {
        "family": "nvae",
        "image_size": 32,
        "image_channels": 3,
        "classes": 0,
        "scales": 2,
        "groups": 4,
        "adaptive_groups": True,
        "min_groups": 1,
        "latent_channels": 3,
        "encoder_channels": 4,
        "decoder_channels": 8,
        "halvings": 1,
        "preprocess_cells": 2,
        "postprocess_cells": 3,
        "encoder_cells": 1,
        "decoder_cells": 2,
        "flows": 1,
        "squeeze_excite": True,
        "residual_posterior": True,
        "architecture": "res_mbconv",
    }
    assert config.likelihood.kind == "logistic_mixture"
    assert config.likelihood.components == 5


@pytest.mark.parametrize(
    ("dataset", "size", "channels", "border"),
    [
        ("mnist", 32, 1, 2),
        ("omniglot", 32, 1, 2),
        ("stacked_mnist", 32, 3, 2),
        ("cifar10", 32, 3, 0),
        ("imagenet_32", 32, 3, 0),
        ("imagenet_64", 64, 3, 0),
        ("celeba_64", 64, 3, 0),
        ("celeba_256", 256, 3, 0),
        ("ffhq", 256, 3, 0),
        ("lsun_bedroom_128", 128, 3, 0),
        ("lsun_church_64", 64, 3, 0),
        ("lsun_bedroom_256", 256, 3, 0),
    ],
)
def test_a_data_set_tells_size_channels_and_padding(dataset: str, size: int, channels: int, border: int) -> None:
    config = config_from_args(args(dataset=dataset))
    assert image_size(dataset) == size
    assert (config.image_size, config.image_channels, config.likelihood.border) == (size, channels, border)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"dataset": "mnist"}, "bernoulli"),
        ({"dataset": "omniglot", "num_mixture_dec": 1}, "bernoulli"),
        ({"num_mixture_dec": 10}, "logistic_mixture"),
        ({"num_mixture_dec": 1}, "normal"),
    ],
)
def test_channels_and_components_tell_the_likelihood(changes: dict[str, Any], kind: str) -> None:
    assert config_from_args(args(**changes)).likelihood.kind == kind


def test_binary_images_keep_8_bits() -> None:
    assert config_from_args(args(dataset="mnist", num_x_bits=5)).likelihood.bits == 8
    assert config_from_args(args(num_x_bits=5)).likelihood.bits == 5


def test_older_checkpoints_lack_arguments() -> None:
    old = args()
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        delattr(old, name)
    config = config_from_args(old)
    assert (config.adaptive_groups, config.min_groups, config.likelihood.components) == (False, 1, 10)


def test_the_published_edge_is_kept_unless_asked_otherwise() -> None:
    assert config_from_args(args()).likelihood.edge == "published"
    assert config_from_args(args(), "right").likelihood.edge == "right"


def test_arguments_and_config_are_inverse() -> None:
    assert args_from_config(config_from_args(args()), "cifar10") == args()


@pytest.mark.parametrize("name", ["dataset", "num_nf", "arch_instance"])
def test_a_missing_argument_is_named(name: str) -> None:
    incomplete = args()
    delattr(incomplete, name)
    assert complaint(config_from_args, incomplete) == f"args: the published checkpoint lacks '{name}'"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch_instance": "res_mbconw"}, "architecture: no 'res_mbconw'; did you mean 'res_mbconv'?"),
        ({"num_channels_enc": "many"}, "encoder_channels: input should be a valid integer"),
        ({"num_latent_scales": 9}, "image_size: 32 pixels can be halved 5 times"),
        ({"num_postprocess_blocks": 2}, "num_preprocess_blocks and num_postprocess_blocks differ"),
    ],
)
def test_impossible_arguments_are_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    message = complaint(config_from_args, args(**changes))
    assert message.startswith("args:")
    assert sentence in message


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_has_one_published_name(tiny_config: Make, architecture: str) -> None:
    """Save what is ours alone: the vectors of the spectral penalty and whether a start was made."""
    config = tiny_config(
        image_size=32, architecture=architecture, scales=2, flows=2, encoder_channels=8, decoder_channels=8
    )
    model = NVAE(config)
    names = tensor_names(model)
    own = {name for name in model.state_dict() if name == "started" or name.startswith("spectral.")}
    assert set(names) == set(model.state_dict()) - own
    assert len(set(names.values())) == len(names)


def test_names_are_those_of_the_spec(tiny_config: Make) -> None:
    config = tiny_config(image_size=32, scales=2, groups=2, flows=1, preprocess_cells=2, postprocess_cells=2)
    names = set(tensor_names(NVAE(config)).values())
    expected = {
        "stem.weight",
        "pre_process.0._ops.0.bn_act.running_mean",
        "pre_process.1.skip.conv_4.log_weight_norm",
        "enc_tower.0._ops.1.conv_0.bias",  # cell, combiner, cell, combiner, down, cell, combiner, cell
        "enc_tower.1.conv.weight",
        "enc_tower.4.skip.conv_1.weight",
        "enc_tower.7.se.se.2.bias",
        "enc0.1.weight",
        "enc_sampler.3.weight",
        "dec_sampler.2.1.weight",
        "nf_cells.3.cell2.conv.convz.2.weight",
        "nf_cells.0.cell1.mu.conv_0.bias",
        "prior_ftr0",
        "dec_tower.0.conv.weight",  # combine, cell, combine, up, cell, combine, cell, combine
        "dec_tower.1._ops.0.conv.0.bn.weight",
        "dec_tower.1._ops.0.conv.2.conv.0.weight",
        "dec_tower.1._ops.0.conv.4.bn.running_var",
        "dec_tower.3.skip.1.weight",
        "dec_tower.3._ops.0.conv.4.weight",
        "dec_tower.7.conv.bias",
        "post_process.0._ops.0.conv.1.bn.bias",
        "post_process.1.se.se.0.weight",
        "image_conditional.1.weight",
    }
    assert expected <= names


def test_a_vanilla_model_has_no_towers(tiny_config: Make) -> None:
    names = set(tensor_names(NVAE(tiny_config(image_size=32, groups=1))).values())
    assert {"stem_decoder.weight", "prior_ftr0"} <= names
    assert not any("tower" in name for name in names)


# -------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back_is_bitwise(tiny_config: Make, architecture: str) -> None:
    config = tiny_config(
        image_size=32, architecture=architecture, scales=2, flows=1, encoder_channels=8, decoder_channels=8
    )
    model = NVAE(config)
    model(torch.rand(2, 3, 32, 32))
    back = from_published(to_published(model, "cifar10"), "right")
    assert back.config == config
    for name, theirs in tensor_names(model).items():
        assert torch.equal(back.state_dict()[name], model.state_dict()[name]), theirs


def test_a_model_from_a_checkpoint_is_in_eval_mode(tiny_config: Make) -> None:
    assert not from_published(checkpoint(tiny_config(image_size=32))).training


def test_what_is_written_is_a_copy(tiny_config: Make) -> None:
    model = NVAE(tiny_config(image_size=32))
    published = to_published(model, "cifar10")
    before = published["state_dict"]["stem.weight"].clone()
    model.stem.weight.data.zero_()
    assert torch.equal(published["state_dict"]["stem.weight"], before)


def test_redundant_entries_are_written_and_not_needed(tiny_config: Make) -> None:
    content = checkpoint(tiny_config(image_size=32))
    redundant = [name for name in content["state_dict"] if name.endswith("weight_normalized")]
    assert redundant
    for name in redundant:
        del content["state_dict"][name]
    from_published(content)


def test_the_table_of_ops_is_written_with_published_names(tiny_config: Make) -> None:
    config = tiny_config(image_size=32, architecture="res53_mbconv")
    assert checkpoint(config)["arch_instance"] == {
        "normal_pre": ["res_bnswish5", "res_bnswish"],
        "down_pre": ["res_bnswish5", "res_bnswish"],
        "normal_enc": ["res_bnswish5", "res_bnswish"],
        "down_enc": ["res_bnswish5", "res_bnswish"],
        "normal_dec": ["mconv_e6k5g0"],
        "up_dec": ["mconv_e6k5g0"],
        "normal_post": ["mconv_e3k5g0"],
        "up_post": ["mconv_e3k5g0"],
        "ar_nn": [""],
    }


# -------------------------------------------------------------------------------------------------- what does not fit


def test_a_missing_tensor_is_named(tiny_config: Make) -> None:
    content = checkpoint(tiny_config(image_size=32))
    del content["state_dict"]["stem.bias"]
    assert "1 tensors missing and 0 unknown; it lacks 'stem.bias'" in complaint(from_published, content)


def test_weights_of_another_model_are_refused(tiny_config: Make) -> None:
    content = checkpoint(tiny_config(image_size=32))
    content["args"].num_groups_per_scale = 3
    assert "weights and args are of different models" in complaint(from_published, content)


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("num_latent_per_group", 4, "num_latent_per_group is 4 in the args, 3 by the weights"),
        ("num_channels_enc", 8, "num_channels_enc is 8 in the args, 4 by the weights"),
        ("num_groups_per_scale", 3, "num_groups_per_scale, num_latent_scales is 3 groups in the args, 2 groups by"),
        ("num_nf", 1, "num_nf is 1 in the args, 0 by the weights"),
        ("use_se", False, "use_se is False in the args, True by the weights"),
        ("dataset", "celeba_64", "the sides of the dataset's images is 32 in the args, 16 by the weights"),
    ],
)
def test_arguments_of_another_model_are_named(tiny_config: Make, argument: str, value: Any, sentence: str) -> None:
    content = checkpoint(tiny_config(image_size=32))
    setattr(content["args"], argument, value)
    assert sentence in complaint(from_published, content)


def test_a_tensor_of_another_shape_is_named_where_no_argument_says_so(tiny_config: Make) -> None:
    content = checkpoint(tiny_config(image_size=32))
    content["state_dict"]["stem.bias"] = torch.zeros(3)
    assert complaint(from_published, content) == "state_dict: 'stem.bias' is [3], the args makes it [4]"


def test_what_is_no_tensor_is_named(tiny_config: Make) -> None:
    content = checkpoint(tiny_config(image_size=32))
    content["state_dict"]["stem.bias"] = 3
    assert complaint(from_published, content) == "state_dict: 'stem.bias' is no tensor"


@pytest.mark.parametrize(
    ("changes", "dataset", "sentence"),
    [
        ({"image_size": 16}, "cifar10", "image_size: 16; a published checkpoint of cifar10 would mean 32"),
        ({}, "mnist", "image_channels: 3; a published checkpoint of mnist would mean 1"),
        (
            {"likelihood": {"components": 1}},
            "cifar10",
            "likelihood.kind: logistic_mixture; a published checkpoint of cifar10 would mean normal",
        ),
        (
            {"image_channels": 1, "likelihood": {"components": 2, "border": 2}},
            "mnist",
            "likelihood.kind: logistic_mixture; a published checkpoint of mnist would mean bernoulli",
        ),
        (
            {"image_channels": 1, "likelihood": {"kind": "bernoulli"}},
            "mnist",
            "likelihood.border: 0; a published checkpoint of mnist would mean 2",
        ),
        (
            {"likelihood": {"bits": 5, "grid": "truncated"}},
            "cifar10",
            "likelihood.grid: truncated; a published checkpoint of cifar10 would mean stretched",
        ),
    ],
)
def test_what_the_published_format_cannot_tell_is_refused(
    tiny_config: Make, changes: dict[str, Any], dataset: str, sentence: str
) -> None:
    config = tiny_config(**{"image_size": 32, **changes})
    assert complaint(args_from_config, config, dataset) == sentence
