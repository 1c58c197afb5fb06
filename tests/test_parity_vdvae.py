"""The recorded vectors of the published Very Deep VAE: the network is numerically equal to it.

Every folder of tests/parity_vdvae/, or of $NVAE_PARITY_VDVAE_DIR, is a case: `model.th` in the published format,
`expected.safetensors`, `expected.json`. Agreement is max|Δ| / max|reference| ≤ 3e-6.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvae.bricks.likelihoods import LikelihoodConfig
from nvae.checkpoints.conversion import convert
from nvae.checkpoints.format import read_safely
from nvae.checkpoints.loading import load_model
from nvae.core.config import Config, dump_yaml
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE
from nvae.models.vdvae.published import from_published, to_published

TOLERANCE = 3e-6
ROOT = Path(os.environ.get("NVAE_PARITY_VDVAE_DIR", Path(__file__).parent / "parity_vdvae"))
CASES = sorted(path.parent for path in ROOT.glob("*/expected.json"))
assert CASES, f"{ROOT} holds no parity cases"


def assert_close(ours: Tensor | float, reference: Tensor | float) -> None:
    ours, reference = torch.as_tensor(ours).double(), torch.as_tensor(reference).double()
    assert ours.shape == reference.shape
    error = float((ours - reference).abs().max() / reference.abs().max())
    assert error <= TOLERANCE


@dataclass
class Case:
    file: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def config(self) -> VDVAEConfig:
        h = self.facts["hparams"]
        low_bit = h["dataset"] == "ffhq_256"
        return VDVAEConfig(
            image_size=h["image_size"],
            image_channels=h["image_channels"],
            width=h["width"],
            widths=h["custom_width_str"],
            latent_channels=h["zdim"],
            bottleneck=h["bottleneck_multiple"],
            bias_up_to=h["no_bias_above"],
            encoder=h["enc_blocks"],
            decoder=h["dec_blocks"],
            input_mean=120.63838,
            input_std=64.16736,
            likelihood=LikelihoodConfig(
                components=h["num_mixtures"], bits=5 if low_bit else 8, grid="truncated", edge="published"
            ),
        )

    def model(self) -> VDVAE:
        return from_published(read_safely(self.file), config=self.config)

    @property
    def image(self) -> Tensor:
        return self.tensors["image"] / 255

    @property
    def noise(self) -> list[Tensor]:
        return [self.tensors[f"noise.{i}"] for i in range(len(self.tensors["latent_mean_abs"]))]


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    folder: Path = request.param
    facts = json.loads((folder / "expected.json").read_text())
    return Case(folder / "model.th", load_file(folder / "expected.safetensors"), facts)


@pytest.fixture(scope="module", params=["plain", "for inference", "recomputing"])
def model(request: pytest.FixtureRequest, case: Case) -> Any:
    """The model in each of its forms: none may change a number."""
    model = case.model()
    if request.param == "recomputing":
        model.train().set_recomputation("cells")
    return model.for_inference() if request.param == "for inference" else model


def thinned(image: Tensor) -> Tensor:
    """The recorded part of a decoder tensor: first image, every 4th row and column."""
    return image[:1, :, ::4, ::4]


def test_parameter_count(case: Case) -> None:
    assert sum(p.numel() for p in case.model().parameters()) == case.facts["num_parameters"]


def test_encoding_and_decoding(case: Case, model: Any) -> None:
    expected = case.tensors
    with torch.no_grad():
        output = model(case.image, case.noise)
    assert_close(thinned(output.likelihood.params), expected["decoder_params"])
    assert_close(output.kl, expected["kl_per_block"])
    assert_close(output.reconstruction / output.likelihood.dims, expected["nll_per_dim"])
    assert_close(torch.stack([z.abs().mean() for z in output.z]), expected["latent_mean_abs"])


def test_sampling(case: Case, model: Any) -> None:
    temperatures = [name.partition("@")[2] for name in case.tensors if name.startswith("sample.decoder_params@")]
    assert temperatures
    for temperature in temperatures:
        with torch.no_grad():
            likelihood = model.sample(2, temperature=float(temperature), noise=case.noise)
        assert_close(thinned(likelihood.params), case.tensors[f"sample.decoder_params@{temperature}"])


def test_given_latents_decode_to_the_image_they_came_from(case: Case, model: Any) -> None:
    with torch.no_grad():
        latents = model(case.image, case.noise).z
        likelihood = model.sample(2, latents=latents)
    assert_close(thinned(likelihood.params), case.tensors["set_latents.decoder_params"])


@pytest.mark.parametrize("recomputation", ["none", "cells"])
def test_training_trajectory(case: Case, recomputation: Any) -> None:
    settings = case.facts["train"]
    model = case.model().train()
    model.set_recomputation(recomputation)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"], betas=settings["betas"], eps=1e-8
    )
    losses, norms = [], []
    for _ in settings["elbo_nats_per_dim"]:
        loss, _ = model.loss(model(case.image, case.noise), 0.0)
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"]))
        optimiser.step()
    assert_close(torch.stack(losses), torch.tensor(settings["elbo_nats_per_dim"]))
    assert_close(norms[0], settings["first_step_grad_norm"])


def test_round_trip_gives_back_every_tensor_bitwise(case: Case) -> None:
    published = read_safely(case.file)
    back = to_published(case.model())
    assert set(back) == set(published)
    for name, tensor in published.items():
        assert torch.equal(back[name], tensor), name


def test_the_one_door_loads_it_with_a_config_and_says_where_its_likelihood_errs(case: Case) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(case.file, config=case.config)
    assert model.config == case.config
    assert ["published mixture edge" in str(warning.message) for warning in caught] == [True] * (
        case.config.likelihood.bits < 8
    )
    assert load_model(case.file, config=case.config, mixture_edge="right").config.likelihood.edge == "right"


def test_converting_to_ours_and_back_gives_back_every_tensor_bitwise(case: Case, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(Recipe(model=case.config)))
    convert(case.file, tmp_path / "ours.pt", config=recipe)
    assert load_model(tmp_path / "ours.pt").config == case.config
    convert(tmp_path / "ours.pt", tmp_path / "back.th")
    back = read_safely(tmp_path / "back.th")
    for name, tensor in read_safely(case.file).items():
        assert torch.equal(back[name], tensor), name


class Recipe(Config):
    model: VDVAEConfig


def test_without_a_config_it_is_refused_in_a_sentence(case: Case) -> None:
    with pytest.raises(UserError, match="carries no hyper-parameters: give the config of its recipe"):
        load_model(case.file)


def test_a_config_of_another_model_is_refused_and_named(case: Case) -> None:
    with pytest.raises(UserError, match="of family 'nvae'"):
        load_model(case.file, config=NVAEConfig())
    other = case.config.model_copy(update={"width": 2 * case.config.width})
    with pytest.raises(
        UserError, match=rf"state_dict: .* model\.width is {other.width} in the config, {case.config.width} by"
    ):
        load_model(case.file, config=other)


def test_a_leading_module_is_taken_off(case: Case, tmp_path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in read_safely(case.file).items()}, tmp_path / "model.th")
    ours = load_model(tmp_path / "model.th", config=case.config, mixture_edge="right").state_dict()
    for name, tensor in case.model().state_dict().items():
        assert torch.equal(ours[name], tensor)
