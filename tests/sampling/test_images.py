"""Samples: the same pictures however the work is cut, temperatures, and batch norm fitted to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_gaussian import linear_gaussian
from places import ROOT
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvae.bricks.convolutions import Conv2d
from nvae.bricks.normalisation import BatchNorm
from nvae.core.config import read_yaml, validate
from nvae.core.distributed import gather_objects, rank, world_size
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.registry import family
from nvae.sampling.images import readjust, readjust_cached, sample_images, shares, temperature_of
from nvae.sampling.pictures import to_bytes

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def model(tiny_config: Any) -> NVAE:
    return NVAE(tiny_config(scales=2, groups=2, adaptive_groups=True)).eval()


def agreement(ours: Tensor, other: Tensor) -> float:
    """Fraction of equal bytes."""
    return float((to_bytes(ours) == to_bytes(other)).float().mean())


# ---------------------------------------------------------------------------------------------------- temperatures


def test_temperatures_are_one_or_one_per_scale_or_one_per_group(model: NVAE) -> None:
    assert [shape[2] for shape in model.latent_shapes(1)] == [2, 4, 4]
    assert temperature_of([0.7], model) == 0.7
    assert temperature_of([0.5, 0.9], model) == [0.5, 0.9, 0.9]
    assert temperature_of([0.5, 0.6, 0.7], model) == [0.5, 0.6, 0.7]
    with pytest.raises(UserError, match=r"4 values; give one, one per scale \(2, smallest first\)"):
        temperature_of([1.0] * 4, model)


def test_samples_at_temperature_zero_are_all_the_same(model: NVAE) -> None:
    images = sample_images(model, range(3), 0.0)
    assert torch.allclose(images[0], images[1], atol=1e-6)
    assert not torch.allclose(*sample_images(model, range(2), 1.0), atol=1e-2)


def test_the_spread_of_samples_is_the_temperature() -> None:
    toy = linear_gaussian()
    cold, warm = (sample_images(toy, range(50), t) for t in (0.5, 1.0))
    assert torch.allclose(2 * cold, warm)


# ------------------------------------------------------------------------------------------ however the work is cut


@pytest.mark.parametrize("pixels", ["mean", "draw"])
def test_pictures_do_not_depend_on_the_batch(model: NVAE, pixels: Any) -> None:
    together = sample_images(model, range(12), 0.8, pixels=pixels)
    apart = torch.cat([sample_images(model, [i], 0.8, pixels=pixels) for i in range(12)])
    assert agreement(together, apart) >= 0.999
    assert agreement(together, sample_images(model, range(12), 0.8, seed=1, pixels=pixels)) < 0.9


def test_pixels_are_drawn_anew_for_every_picture_and_seed(model: NVAE) -> None:
    """At temperature 0 all latents are the same, so what differs is the draw of the pixels."""
    first = sample_images(model, range(2), 0.0, pixels="draw")
    assert agreement(*first) < 0.9
    assert agreement(first, sample_images(model, range(2), 0.0, seed=1, pixels="draw")) < 0.9


def sample_on_this_rank(path: Path) -> None:
    torch.manual_seed(0)
    model = NVAE(validate(NVAEConfig, {"image_size": 8, "groups": 2, "encoder_channels": 4, "decoder_channels": 4}, ""))
    readjust(model, 0.7, batches=7, batch=4)
    mine = {n: image for chosen in shares(11, 3) for n, image in zip(chosen, sample_images(model, chosen), strict=True)}
    every = [item for part in gather_objects(mine) for item in part.items()]
    if rank() == 0:
        images = torch.stack([image for _, image in sorted(every, key=lambda item: item[0])])
        save_file({"images": images}, path / f"{world_size()}.safetensors")


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    sample_on_this_rank(tmp_path)
    run_ranks(3, sample_on_this_rank, tmp_path)
    one, two = (load_file(tmp_path / f"{world}.safetensors")["images"] for world in (1, 3))
    assert one.shape == two.shape == (11, 3, 8, 8)
    assert agreement(one, two) >= 0.999


def test_the_border_is_cut_off(tiny_config: Any) -> None:
    model = NVAE(tiny_config(image_channels=1, likelihood={"kind": "bernoulli", "border": 1})).eval()
    assert sample_images(model, range(2)).shape == (2, 1, 6, 6)
    drawn = sample_images(model, range(2), pixels="draw")
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}


# ---------------------------------------------------------------------------------------------- batch-norm statistics


def decoder_inputs(model: NVAE, temperature: float) -> dict[str, tuple[Tensor, Tensor]]:
    """What each batch norm of the decoder sees of many samples, when none of them looks at its batch."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0]))
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    ]
    with torch.no_grad():
        model.sample(512, temperature)
    for hook in hooks:
        hook.remove()
    return {name: (x[0].mean((0, 2, 3)), x[0].var((0, 2, 3))) for name, x in seen.items()}


def test_readjusted_statistics_are_those_of_the_samples(model: NVAE) -> None:
    readjust(model, 0.6, batches=100, batch=64)
    norms = dict(model.named_modules())
    seen = decoder_inputs(model, 0.6)
    assert len(seen) > 10
    for name, (mean, var) in seen.items():
        assert torch.allclose(norms[name].running_mean, mean, atol=0.1 * float(var.max().sqrt()))
        assert torch.allclose(norms[name].running_var, var, rtol=0.35, atol=1e-6)


def test_readjusted_statistics_are_plain_averages_over_the_batches(
    model: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches count alike, whatever came before: against float64, from what each batch norm was given."""
    seen: dict[BatchNorm, list[Tensor]] = {}
    original = BatchNorm.advance

    def advance(norm: BatchNorm, statistics: Tensor, x: Tensor) -> None:
        mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
        count = x.numel() // x.shape[1] * norm.copies
        seen.setdefault(norm, []).append(torch.stack([mean, var * count / (count - 1)]))
        original(norm, statistics, x)

    monkeypatch.setattr(BatchNorm, "advance", advance)
    readjust(model, 0.6, batches=5, batch=3)
    assert len(seen) > 10
    for norm, moments in seen.items():
        assert len(moments) == 5
        mean, var = torch.stack(moments).mean(0)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5 * float(var.max().sqrt()))
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-7 * float(var.max()))


def test_readjusting_leaves_the_encoder_and_the_weights_alone(model: NVAE) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    readjust(model, 0.6, batches=3, batch=4)
    assert not model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in changed if name.endswith(("running_mean", "running_var"))}
    assert all(name.endswith("num_batches_tracked") for name in changed - statistics)
    assert statistics and not any("encoder" in name or "preprocess" in name or "down" in name for name in statistics)


def test_readjustment_is_computed_once_per_temperature(model: NVAE, tmp_path: Path) -> None:
    calls = []
    original = model.sample
    model.sample = lambda *args, **kwargs: calls.append(args[1]) or original(*args, **kwargs)  # type: ignore[method-assign]
    for temperature in (0.6, 0.8, 0.6):
        readjust_cached(model, temperature, tmp_path, "weights", batches=2, batch=4)
    assert calls == [0.6, 0.6, 0.8, 0.8]
    first = {name: value.clone() for name, value in model.state_dict().items()}
    readjust(model, 0.6, batches=2, batch=4)
    assert all(torch.allclose(first[name], value) for name, value in model.state_dict().items() if "running" in name)


def test_readjustment_is_in_float32_whatever_the_precision(model: NVAE) -> None:
    types = set()
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        readjust(model, 0.6, batches=1, batch=4)
        assert types == {torch.float32}
        sample_images(model, range(2))
    assert torch.bfloat16 in types


def test_a_family_without_batch_norm_has_nothing_to_readjust() -> None:
    assert readjust(linear_gaussian(), 0.6, batches=1) == {}


def test_a_non_finite_statistic_is_an_error(model: NVAE) -> None:
    with torch.no_grad():
        model.first_state.fill_(torch.inf)
    with pytest.raises(UserError, match=r"batch norm '.*' meets non-finite numbers"):
        readjust(model, 0.6, batches=1, batch=2)


# -------------------------------------------------------------------------------------------- every recipe's geometry


def narrow(path: Path) -> dict[str, Any]:
    """The model section of a recipe at 8 channels."""
    section: dict[str, Any] = {**read_yaml(path)["model"]}
    return {**section, "encoder_channels": 8, "decoder_channels": 8}


NVAES = [path for path in RECIPES if read_yaml(path)["model"]["family"] == "nvae"]
LARGE = ("celeba_64", "cifar10", "imagenet_64", "lsun_church")
LARGEST = ("celeba_hq_256", "ffhq_256", "lsun_bedroom")
MARKS = dict.fromkeys(LARGE, pytest.mark.slow) | dict.fromkeys(LARGEST, pytest.mark.full)
recipes = pytest.mark.parametrize(
    "path", [pytest.param(path, marks=MARKS.get(path.stem, ()), id=path.stem) for path in NVAES]
)


def finite_in(types: list[torch.dtype], path: Path, device: str) -> bool:
    """Whether samples at 0.6, after re-adjustment on 4 batches of 2, are finite in each of the types."""
    model = family("nvae")(validate(NVAEConfig, narrow(path), path.stem)).to(device)
    readjust(model, 0.6, batches=4, batch=2)
    found = []
    for dtype in types:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            found.append(sample_images(model.for_inference(), range(2), 0.6))
    return bool(torch.cat(found).isfinite().all())


@recipes
def test_readjusted_samples_of_every_recipe_are_finite(path: Path) -> None:
    assert finite_in([torch.float32, torch.bfloat16], path, "cpu")


@pytest.mark.gpu
@recipes
def test_readjusted_samples_of_every_recipe_are_finite_in_half_precision(path: Path) -> None:
    assert finite_in([torch.float16], path, "cuda")
