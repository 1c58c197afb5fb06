"""Codes: out and back again, prefixes, interpolation, traversal, neighbours."""

import math
from typing import Any

import pytest
import torch
from linear_gaussian import LinearGaussian, linear_gaussian
from torch import Tensor

from nvae.core.errors import UserError
from nvae.data.loading import Batch
from nvae.models.nvae.model import NVAE
from nvae.sampling.latent_space import (
    decode,
    encode,
    from_epsilon,
    interpolate,
    nearest,
    reconstruct,
    spherical,
    traverse,
)


@pytest.fixture(params=[0, 1], ids=["no flow", "flow"])
def model(request: pytest.FixtureRequest, tiny_config: Any) -> NVAE:
    return NVAE(tiny_config(scales=2, groups=2, adaptive_groups=True, flows=request.param)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 8, 8)) / 255


def close(ours: Tensor, other: Tensor) -> bool:
    return torch.allclose(ours, other, atol=1e-5)


def test_a_code_is_what_the_prior_makes_of_its_epsilon(model: NVAE, images: Tensor) -> None:
    code = encode(model, images)
    assert [z.shape for z in code.z] == [torch.Size(shape) for shape in model.latent_shapes(4)]
    for p, epsilon, z in zip(code.prior, code.epsilon, code.z, strict=True):
        assert close(p.mean + p.sigma * epsilon, z)
    assert close(from_epsilon(model, code.epsilon), decode(model, code.z))


def test_a_code_is_a_draw_from_the_posterior(images: Tensor, tiny_config: Any) -> None:
    model = NVAE(tiny_config()).eval()
    codes = [encode(model, images, seed=seed) for seed in range(200)]
    q = codes[0].posterior[0]
    drawn = torch.stack([code.z[0] for code in codes])
    assert ((drawn.mean(0) - q.mean) / (q.sigma / math.sqrt(200))).abs().mean() < 1.0  # 0.8 for a Normal
    assert torch.allclose(drawn.std(0) / q.sigma, torch.ones_like(q.sigma), atol=0.3)


def test_a_reconstruction_from_all_groups_is_the_decoded_code(model: NVAE, images: Tensor) -> None:
    assert close(reconstruct(model, images), decode(model, encode(model, images).z))
    assert close(reconstruct(model, images, groups=3), reconstruct(model, images))


def test_a_prefix_keeps_its_groups_and_the_prior_gives_the_rest(model: NVAE, images: Tensor) -> None:
    code = encode(model, images)
    cold = decode(model, code.z[:1], temperature=0.0)
    assert close(reconstruct(model, images, groups=1, temperature=0.0), cold)
    assert not close(cold, decode(model, code.z))
    assert close(reconstruct(model, images, groups=0), decode(model, [], count=4))


def test_more_groups_than_there_are_is_an_error(model: NVAE, images: Tensor) -> None:
    with pytest.raises(UserError, match="groups: the model has 3 latent groups, found 4"):
        reconstruct(model, images, groups=4)
    with pytest.raises(UserError, match="group: the model has 3 latent groups, counted from 0; found 3"):
        traverse(model, images, 3, 5)


def test_an_interpolation_starts_and_ends_at_the_reconstructions(model: NVAE, images: Tensor) -> None:
    frames = interpolate(model, images[:2], images[2:], 5)
    assert frames.shape == (5, 2, 3, 8, 8)
    rebuilt = reconstruct(model, images)
    assert close(frames[0], rebuilt[:2]) and close(frames[-1], rebuilt[2:])
    assert not close(frames[2], frames[0])


def test_spherical_interpolation_of_unit_vectors_stays_on_the_sphere() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 6, 10, dtype=torch.float64), dim=2)
    angles = []
    for step in range(5):
        point = spherical(a, b, step / 4)
        assert torch.allclose(point.norm(dim=1), torch.ones(6, dtype=torch.float64))
        angles.append(torch.acos((point * a).sum(1).clamp(-1, 1)))
    assert torch.allclose(angles[2], angles[4] / 2) and torch.allclose(angles[1] + angles[3], angles[4])


def test_spherical_interpolation_of_equal_points_stays_there() -> None:
    a = torch.randn(3, 2, 4, 4)
    assert torch.allclose(spherical(a, a, 0.3), a, atol=1e-4)


def test_a_traversal_passes_through_the_image_and_moves_one_group(model: NVAE, images: Tensor) -> None:
    frames = traverse(model, images, 1, 5)
    assert close(frames[2], reconstruct(model, images))
    assert not close(frames[0], frames[4])


def test_a_linear_model_interpolates_along_its_arc() -> None:
    toy = linear_gaussian()
    images = torch.rand(2, 3, 4, 4)
    frames = interpolate(toy, images[:1], images[1:], 3)
    first, last = encode(toy, images).z[0]
    middle = spherical(first[None], last[None], 0.5)
    assert torch.allclose(frames[1].flatten().double(), (toy.matrix @ middle.flatten()).detach(), atol=1e-5)


def test_the_nearest_images_are_found_over_batches() -> None:
    images = torch.rand(30, 1, 4, 4)
    unknown = torch.full((7,), -1)
    batches = [Batch(images[i : i + 7], list(range(i, min(i + 7, 30))), unknown) for i in range(0, 30, 7)]
    queries = images[[3, 20]] + 0.001
    distances, positions = nearest(queries, batches, 4)
    exact = (queries[:, None] - images).flatten(2).norm(dim=2).sort(dim=1)
    assert torch.equal(positions, exact.indices[:, :4])
    assert torch.allclose(distances, exact.values[:, :4])
    assert positions[:, 0].tolist() == [3, 20]


def test_latents_that_are_not_normal_have_no_epsilon(images: Tensor) -> None:
    class Discrete(LinearGaussian):
        latent_kind = "discrete"

    with pytest.raises(UserError, match="Discrete: its latents are not Normal"):
        encode(linear_gaussian(Discrete), torch.rand(1, 3, 4, 4))
