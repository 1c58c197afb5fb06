"""What is kept of images: means, draws, moments and codes of every family, and what models take of them again."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_codecs import MODELS, stirred, tiny_nvae
from torch import Tensor
from toy_family import Toy, ToyConfig

from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.data.loading import Batch
from nvae.models.base import Family
from nvae.models.vqvae.config import VQVAEConfig
from nvae.models.vqvae.model import VQVAE
from nvae.sampling.encoding import Encoder, Kept, as_latents
from nvae.sampling.latent_space import decode, encode

KINDS = {
    **MODELS,
    "nvae, flows": lambda: tiny_nvae(scales=2, adaptive_groups=True, flows=1),
    "nvae, classes": lambda: tiny_nvae(classes=10),
    "toy": lambda: stirred(Toy(validate(ToyConfig, TOY, "toy"))),
}
TOY: dict[str, Any] = {"image_size": 8, "image_channels": 1, "likelihood": {"kind": "bernoulli"}}
NORMAL = [name for name, make in KINDS.items() if make().latent_kind == "normal"]


def images_of(model: Family[Any], count: int = 5) -> Batch:
    config = model.config
    images = torch.bernoulli(torch.rand(count, config.image_channels, config.image_size, config.image_size))
    return Batch(images, list(range(count)), torch.arange(count))


def latents(model: Family[Any], batch: Batch, *, numbers: Any = None, **kept: Any) -> dict[str, np.ndarray]:
    return Encoder(model, Kept(**kept)).rows(batch, numbers or batch.indices)


def labels_for(model: Family[Any], batch: Batch) -> Tensor | None:
    return batch.labels if model.config.classes else None


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_rebuilt_from_what_is_kept(kind: str) -> None:
    model = KINDS[kind]()
    batch = images_of(model)
    found = latents(model, batch, drawn=kind == "toy")
    assert list(found) == [f"z/{group:02d}" for group in range(len(model.latent_shapes(1)))]
    z = as_latents(model, list(found.values()))
    output = model.decode(model.encode(batch.images, labels_for(model, batch)), latents=z)
    rebuilt = output.likelihood.visible(output.likelihood.mean())
    torch.testing.assert_close(decode(model, z, labels=labels_for(model, batch)), rebuilt)


@pytest.mark.parametrize("kind", NORMAL)
def test_the_mean_is_a_draw_without_noise(kind: str) -> None:
    model = KINDS[kind]()
    batch, shapes = images_of(model), model.latent_shapes(5)
    with torch.no_grad():
        features = model.encode(batch.images, labels_for(model, batch))
        output = model.decode(features, noise=[torch.zeros(shape) for shape in shapes])
    for ours, z in zip(latents(model, batch).values(), output.z, strict=True):
        assert np.array_equal(ours, z.numpy())


def test_means_without_a_flow_are_those_of_the_moments() -> None:
    model = KINDS["very deep"]()
    found = latents(model, images_of(model), moments=True)
    for group in range(len(model.latent_shapes(1))):
        assert np.array_equal(found[f"z/{group:02d}"], found[f"mean/{group:02d}"])
        assert (found[f"scale/{group:02d}"] > 0).all()


def test_a_draw_is_that_of_the_latent_space() -> None:
    model = KINDS["nvae, flows"]()
    batch = images_of(model)
    code = encode(model, batch.images, seed=3)
    for ours, z in zip(latents(model, batch, drawn=True, seed=3).values(), code.z, strict=True):
        assert np.array_equal(ours, z.numpy())


def test_a_draw_is_keyed_on_the_number_of_the_image() -> None:
    model = KINDS["nvae, grey"]()
    batch = images_of(model, 4)
    late = Batch(batch.images[2:], [0, 1], batch.labels[2:])
    whole = latents(model, batch, drawn=True)["z/00"]
    np.testing.assert_allclose(latents(model, late, drawn=True, numbers=[2, 3])["z/00"], whole[2:], atol=1e-5)
    assert not np.allclose(latents(model, late, drawn=True)["z/00"], whole[2:], atol=1e-2)


def test_codes_are_of_the_smallest_type() -> None:
    model = KINDS["codes with a prior"]()
    batch = images_of(model)
    found = latents(model, batch)
    assert [array.dtype for array in found.values()] == [np.uint8] * 2
    for ours, map_ in zip(found.values(), model.codes_of(batch.images), strict=True):
        assert np.array_equal(ours[:, 0], map_.numpy())


def test_half_as_many_bits_round() -> None:
    model = KINDS["nvae, grey"]()
    batch = images_of(model)
    half, whole = latents(model, batch, half=True)["z/00"], latents(model, batch)["z/00"]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_the_first_groups_alone_are_kept() -> None:
    model = KINDS["nvae, flows"]()
    assert list(latents(model, images_of(model), groups=2)) == ["z/00", "z/01"]


@pytest.mark.parametrize(
    ("kind", "kept", "reason"),
    [
        ("very deep", {"groups": 9}, "--groups: the model has 2 latent groups, found 9"),
        ("codes", {"moments": True}, "--moments: has no effect on VQVAE"),
        ("codes", {"half": True}, "--float16: has no effect on VQVAE"),
        ("codes with a prior", {"drawn": True}, "--draw: has no effect on VQVAEPrior"),
        ("toy", {}, "Toy: its images have no codes that are always the same; draw some with --draw"),
    ],
)
def test_what_is_not_there_is_refused(kind: str, kept: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Encoder(KINDS[kind](), Kept(**kept))


@pytest.mark.parametrize(
    ("kind", "array", "reason"),
    [
        ("nvae, grey", np.zeros((2, 2, 4, 5), "f4"), r"z/00: is \(2, 4, 5\) of an image, the model takes \(2, 4, 4\)"),
        ("nvae, grey", np.zeros((2, 2, 4, 4), "i8"), "z/00: takes floating-point numbers, found int64"),
        ("nvae, grey", np.full((2, 2, 4, 4), np.nan), "z/00: takes finite numbers"),
        ("codes", np.zeros((2, 1, 2, 2), "f4"), "z/00: takes codes, whole numbers, found float32"),
        ("codes", np.full((2, 1, 2, 2), 6), "z/00: takes codes from 0 to 5, found 6 to 6"),
        ("codes", np.full((2, 1, 2, 2), -1), "z/00: takes codes from 0 to 5, found -1 to -1"),
    ],
)
def test_what_a_model_does_not_take_is_refused(kind: str, array: np.ndarray, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        as_latents(KINDS[kind](), [array])


def test_more_groups_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match="the model has 2 latent groups, found 3"):
        as_latents(KINDS["codes"](), [np.zeros((1, 1, 2, 2), "u1")] * 3)


@pytest.mark.parametrize(("codes", "dtype"), [(6, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_the_type_follows_the_number_of_codes(codes: int, dtype: Any) -> None:
    model = KINDS["codes"]()
    assert isinstance(model, VQVAE) and isinstance(model.config, VQVAEConfig)
    model.codes = codes
    assert Encoder(model, Kept()).columns["z/00"][0] == dtype
