"""The recorded vectors of public VQ-VAE codes: quantisers, networks of one to three levels, PixelSNAIL priors.

Every folder of tests/parity_vqvae/, or of $NVAE_PARITY_VQVAE_DIR, is a case: `expected.json` (its `kind`, its
hyper-parameters, scalars), `expected.safetensors`, and mostly `model.pt`, a foreign state dict. Agreement is
max|Δ| / max|reference| ≤ 1e-5, of indices and codes equality. A number s in a tensor's name counts calls from 0.
"""

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from nvae.bricks.causal import Walk
from nvae.bricks.likelihoods import LikelihoodConfig
from nvae.bricks.quantiser import (
    AveragedQuantiser,
    Quantised,
    Quantiser,
    QuantiserConfig,
    after_update,
    build_quantiser,
    exact_products,
    perplexity,
    squared_distances,
)
from nvae.checkpoints.conversion import convert
from nvae.checkpoints.format import read_safely
from nvae.checkpoints.loading import load_model
from nvae.core.config import Config, dump_yaml
from nvae.core.errors import UserError
from nvae.models.vqvae.config import VQVAEConfig
from nvae.models.vqvae.network import Network, Shape
from nvae.models.vqvae.pixelsnail import MapShape, PixelSNAIL, PixelSNAILConfig
from nvae.models.vqvae.published import foreign_network, foreign_prior, load_network, load_prior, network_names

TOLERANCE = 1e-5
ROOT = Path(os.environ.get("NVAE_PARITY_VQVAE_DIR", Path(__file__).parent / "parity_vqvae"))
FOLDERS = sorted(path.parent for path in ROOT.glob("*/expected.json"))
assert FOLDERS, f"{ROOT} holds no parity cases"


@dataclass
class Case:
    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def read(folder: Path) -> "Case":
        facts = json.loads((folder / "expected.json").read_text())
        return Case(folder, facts, load_file(folder / "expected.safetensors"))

    def state_dict(self) -> dict[str, Tensor]:
        return read_safely(self.folder / "model.pt")

    def call(self, number: int) -> dict[str, Tensor]:
        """The tensors of a call."""
        prefix = f"{number}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def cases(*kinds: str) -> Any:
    """A test for each case of these kinds."""
    found = [case for case in map(Case.read, FOLDERS) if case.facts["kind"] in kinds]
    return pytest.mark.parametrize("case", found, ids=[case.folder.name for case in found])


def assert_close(ours: Tensor | float, reference: Tensor | float) -> None:
    ours, reference = torch.as_tensor(ours).detach().double(), torch.as_tensor(reference).double()
    assert ours.shape == reference.shape
    error = float((ours - reference).abs().max() / reference.abs().max())
    assert error <= TOLERANCE


def test_every_case_is_of_a_known_kind() -> None:
    known = {"quantiser", "quantiser_by_gradient", "network_one_level", "two_levels", "three_levels", "prior"}
    assert {Case.read(folder).facts["kind"] for folder in FOLDERS} <= known


# ---------------------------------------------------------------------------------------------------------- quantisers


def quantiser_of(case: Case, **fields: Any) -> Quantiser:
    """The quantiser of a case, at its first codes."""
    h = case.facts
    quantiser = build_quantiser(QuantiserConfig(codes=h["codes"], dim=h["dim"], restart=0, **fields))
    with torch.no_grad():
        quantiser.start_from(case.tensors["embeddings.start"].T)
    return quantiser


def pulled(quantiser: Quantiser, call: dict[str, Tensor], commitment: float) -> tuple[Quantised, Tensor, Tensor]:
    """What a quantiser makes of a call, its loss, and the gradient of sum(quantised · w) + loss at x, channels last."""
    x = call["x"].movedim(-1, 1).clone().requires_grad_()
    quantised = quantiser(x)
    loss = quantised.codebook + commitment * quantised.commitment
    ((quantised.output * call["w"].movedim(-1, 1)).sum() + loss).backward()
    assert x.grad is not None
    return quantised, loss, x.grad.movedim(1, -1)


@cases("quantiser")
def test_a_quantiser_by_averages(case: Case) -> None:
    h = case.facts
    gradient = "straight_through" if h.get("gradient", "straight_through") == "straight_through" else "rotation"
    quantiser = quantiser_of(
        case, averages=h["averages"], decay=h["decay"], epsilon=h["epsilon"], gradient=gradient
    ).train()
    for number, expected_loss in enumerate(h["loss"]):
        call = case.call(number)
        trains = number < h["training_steps"]
        quantiser.train(trains)
        if "distances" in call:
            with exact_products(torch.device("cpu")):
                assert_close(squared_distances(call["x"].flatten(0, -2), quantiser.codebook), call["distances"])
        quantised, loss, gradient_at_x = pulled(quantiser, call, h["commitment"])
        assert torch.equal(quantised.indices, call["indices"])
        assert_close(quantised.output.movedim(1, -1), call["quantised"])
        if trains or expected_loss:  # one of the codes has no loss in evaluation
            assert_close(loss, expected_loss)
        if "x_grad" in call:
            assert_close(gradient_at_x, call["x_grad"])
        if "perplexity" in h:
            counts = torch.bincount(quantised.indices.flatten(), minlength=h["codes"])
            assert_close(perplexity(counts), h["perplexity"][number])
        if trains:
            assert isinstance(quantiser, AveragedQuantiser)
            learn(case, quantiser, call, number)


def learn(case: Case, quantiser: AveragedQuantiser, call: dict[str, Tensor], number: int) -> None:
    """The update after a training call, held against what was recorded of it."""
    after_update([quantiser], 0, number, 0.0)
    size, _ = quantiser.averages()
    dead = size < case.facts.get("restart_below", 0.0)
    if dead.any():
        rows = torch.zeros_like(quantiser.codebook)
        rows[dead] = call["x"].flatten(0, -2)[call["restart_rows"][: dead.sum()]]
        quantiser.restart(dead, rows, case.facts["restart_size"])
    if "restarted_in_step" in case.facts:
        assert bool(dead.any()) == bool(case.facts["restarted_in_step"][number])
    size, total = quantiser.averages()
    assert_close(quantiser.codebook.T, call["embeddings"])
    ours = {"cluster_size": size, "embed_sum": total.T, "average_size": size, "average_sum": total.T}
    ours |= {"hidden_size": quantiser.size, "hidden_sum": quantiser.total.T}
    for name in ours.keys() & call.keys():
        assert_close(ours[name], call[name])


@cases("quantiser_by_gradient")
def test_a_quantiser_by_gradient(case: Case) -> None:
    h = case.facts
    quantiser = quantiser_of(case, learning="gradient").train()
    optimiser = torch.optim.Adam(quantiser.parameters(), lr=h["lr"])
    for number, expected_loss in enumerate(h["loss"]):
        call = case.call(number)
        optimiser.zero_grad()
        quantised, loss, gradient_at_x = pulled(quantiser, call, h["commitment"])
        assert torch.equal(quantised.indices, call["indices"])
        assert_close(quantised.output.movedim(1, -1), call["quantised"])
        assert_close(loss, expected_loss)
        assert_close(gradient_at_x, call["x_grad"])
        assert_close(quantiser.codebook.grad.T, call["embeddings_grad"])
        counts = torch.bincount(quantised.indices.flatten(), minlength=h["codes"])
        assert_close(perplexity(counts), h["perplexity"][number])
        optimiser.step()
        assert_close(quantiser.codebook.T, call["embeddings"])


# ------------------------------------------------------------------------------------------------------------ networks


MAPS = {
    "network_one_level": ["evaluated.indices"],
    "two_levels": ["evaluated.bottom", "evaluated.top"],
    "three_levels": ["evaluated.indices_1", "evaluated.indices_2", "evaluated.indices_3"],
}
"""Kind -> the maps of codes, finest first."""


def network_of(case: Case, **quantiser: Any) -> Network:
    """The network of a case; its levels' factors follow from the recorded maps."""
    h = case.facts
    heights = [case.tensors[name].shape[-2] for name in ("images", *MAPS[h["kind"]])]
    network = Network(
        h["channels"],
        h["channels"],
        Shape(h["hidden"], h["residual"], h["blocks"], relu_before_blocks=h["kind"] == "network_one_level"),
        QuantiserConfig(codes=h["codes"], dim=h["dim"], restart=0, **quantiser),
        [larger // smaller for larger, smaller in pairwise(heights)],
    )
    load_network(network, case.state_dict())
    assert sum(p.numel() for p in network.parameters()) == h["parameters"]
    return network


def passed(network: Network, x: Tensor) -> tuple[list[Quantised], Tensor]:
    """Codes of images and their reconstruction."""
    found = network.quantise(network.encode(x))
    return found, network.decode([quantised.output for quantised in found])


def gradient_norm(network: torch.nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


@cases("network_one_level")
def test_a_network_of_one_level(case: Case) -> None:
    h, expected = case.facts, case.tensors
    images = expected["images"] / 255 - 0.5
    learning = {"learning": "gradient"} if h["codebook"] == "gradient" else {"averages": h["codebook"]}
    network = network_of(case, decay=h.get("decay", 0.99), **learning).eval()
    if "evaluated.z" in expected:
        (encoded,) = network.encode(images[0])
        assert_close(network.top_down()[0].vectors(encoded, None), expected["evaluated.z"])
    assert_reconstruction(network, images[0], expected, "evaluated")

    optimiser = torch.optim.Adam(network.parameters(), lr=h["lr"])
    for number, step in enumerate(h["steps"]):
        (quantised,), reconstruction = passed(network.train(), images[number])
        error = F.mse_loss(reconstruction, images[number]) / h["variance"]
        vq_loss = quantised.codebook + h["commitment"] * quantised.commitment
        optimiser.zero_grad()
        (error + vq_loss).backward()
        assert_close(error, step["recon_error"])
        assert_close(vq_loss, step["vq_loss"])
        assert_close(error + vq_loss, step["loss"])
        assert_close(gradient_norm(network), step["gradient_norm"])
        counts = torch.bincount(quantised.indices.flatten(), minlength=h["codes"])
        assert_close(perplexity(counts), step["perplexity"])
        optimiser.step()
        after_update(network.quantisers(), 0, number, 0.0)
    assert_reconstruction(network.eval(), images[0], expected, "after")
    state = foreign_network(network)
    for name in [name for name in state if f"after.{name}" in expected]:
        assert_close(state[name], expected[f"after.{name}"])


@torch.no_grad()
def assert_reconstruction(network: Network, images: Tensor, expected: dict[str, Tensor], when: str) -> None:
    (quantised,), reconstruction = passed(network, images)
    assert torch.equal(quantised.indices, expected[f"{when}.indices"])
    assert_close(reconstruction, expected[f"{when}.reconstruction"])


def rescaled(images: Tensor) -> Tensor:
    return images / 127.5 - 1


@cases("two_levels")
@torch.no_grad()
def test_a_network_of_two_levels_evaluated(case: Case) -> None:
    h, expected = case.facts, case.tensors
    images = rescaled(expected["images"])
    network = network_of(case).eval()
    (top, bottom), decoded = passed(network, images[0])
    for name, quantised in {"top": top, "bottom": bottom}.items():
        assert torch.equal(quantised.indices, expected[f"evaluated.{name}"])
        assert_close(quantised.output, expected[f"evaluated.quantised_{name}"])
    assert_close(decoded, expected["evaluated.decoded"])
    assert_close(F.mse_loss(decoded, images[0]), h["evaluated"]["mse"])
    assert_close(top.commitment + bottom.commitment, h["evaluated"]["latent"])
    values = network.values([top.indices, bottom.indices])
    assert_close(network.decode(values), expected["evaluated.decoded_from_codes"])
    top_only = network.decode([values[0], torch.zeros_like(values[1])])
    assert_close(top_only, expected["evaluated.decoded_top_only_zeros"])


@cases("two_levels")
def test_a_network_of_two_levels_trained(case: Case) -> None:
    h, expected = case.facts, case.tensors
    images = rescaled(expected["images"])
    network = network_of(case, averages=h["averages"], decay=h["decay"], epsilon=h["epsilon"]).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=h["lr"])
    for number, step in enumerate(h["steps"]):
        loss, mse, latent = two_terms(network, images[number], h["commitment"])
        optimiser.zero_grad()
        loss.backward()
        assert_close(loss, step["loss"])
        assert_close(mse, step["mse"])
        assert_close(latent, step["latent"])
        assert_close(gradient_norm(network), step["gradient_norm"])
        for part, norm in step["gradient_norm_by_part"].items():
            assert_close(norm_of(gradients(network), part), norm)
        if number == 0:
            for name in [name for name in expected if name.startswith("first_gradient.")]:
                assert_close(gradients(network)[name.removeprefix("first_gradient.")], expected[name])
        optimiser.step()
        after_update(network.quantisers(), 0, number, 0.0)
        state = foreign_network(network)
        for name, tensor in case.call(number).items():
            level, _, kind = name.partition(".")
            assert_close(state[f"quantize_{level[0]}.{kind}"], tensor)
    with torch.no_grad():
        found, decoded = passed(network.eval(), images[-1])
    assert_close(decoded, expected["after.decoded"])
    assert_close(F.mse_loss(decoded, images[-1]), h["after"]["mse"])
    assert_close(found[0].commitment + found[1].commitment, h["after"]["latent"])


def two_terms(network: Network, images: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its squared error and the sum of its commitments."""
    found, decoded = passed(network, images)
    mse, latent = F.mse_loss(decoded, images), torch.stack([quantised.commitment for quantised in found]).sum()
    return mse + commitment * latent, mse, latent


def gradients(network: Network) -> dict[str, Tensor]:
    """By foreign names."""
    names = network_names(network)
    return {names[name]: p.grad for name, p in network.named_parameters() if p.grad is not None}


def norm_of(tensors: dict[str, Tensor], part: str) -> Tensor:
    return torch.nn.utils.get_total_norm([t for name, t in tensors.items() if name.split(".")[0] == part])


@cases("three_levels")
def test_a_network_of_three_levels(case: Case) -> None:
    h, expected = case.facts, case.tensors
    images = rescaled(expected["images"])
    network = network_of(case, averages="from_zero").eval()
    with torch.no_grad():
        found, decoded = passed(network, images)
        for level, quantised in zip((3, 2, 1), found, strict=True):
            assert torch.equal(quantised.indices, expected[f"evaluated.indices_{level}"])
            assert_close(quantised.output, expected[f"evaluated.quantised_{level}"])
        assert_close(decoded, expected["evaluated.decoded"])
        top, middle, bottom = network.values([quantised.indices for quantised in found])
        assert_close(network.decode([top, middle, 0 * bottom]), expected["evaluated.decoded_3_2_zeros"])
        assert_close(network.decode([top, 0 * middle, 0 * bottom]), expected["evaluated.decoded_3_only_zeros"])

    loss, mse, latent = two_terms(network.train(), images, h["commitment"])
    loss.backward()
    assert_close(loss, h["loss"])
    assert_close(mse, h["mse"])
    assert_close(latent, h["latent"])
    assert_close(gradient_norm(network), h["gradient_norm"])


# -------------------------------------------------------------------------------------------------------------- priors


def prior_of(case: Case) -> PixelSNAIL:
    h = case.facts
    height, width = h["shape"]
    conditional = h["cond_blocks"] > 0
    config = PixelSNAILConfig(
        channels=h["channel"],
        inner_channels=h["res_channel"],
        kernel=h["kernel"],
        blocks=h["blocks"],
        depth=h["res_blocks"],
        attention=h["attention"],
        output_blocks=h["out_blocks"],
        condition_channels=h["cond_channel"] if conditional else 1,
        condition_blocks=h["cond_blocks"],
        dropout=0,
    )
    above = [MapShape(h["codes"], *case.tensors["condition"].shape[2:])] if conditional else []
    prior = PixelSNAIL(MapShape(h["codes"], height, width), config, above)
    load_prior(prior, case.state_dict())
    return prior


def condition(case: Case, prior: PixelSNAIL, number: int) -> Tensor | None:
    above = case.tensors.get("condition")
    return None if above is None else prior.condition([above[number]])


@cases("prior")
@torch.no_grad()
def test_a_prior_evaluated(case: Case) -> None:
    expected, prior = case.tensors, prior_of(case).eval()
    codes, known = expected["codes"][0], condition(case, prior, 0)
    if known is not None:
        assert_close(known, expected["condition_features"])
    assert_close(prior(codes, known), expected["logits"])
    assert_close(prior.nats(codes, known), expected["nll_nats_per_map"])
    rows = expected["logits_of_first_rows"].shape[2]
    assert_close(prior(codes[:, :rows], known), expected["logits_of_first_rows"])


@cases("prior")
def test_cached_logits_are_those_recorded_of_whole_maps(case: Case) -> None:
    expected, prior = case.tensors, prior_of(case).eval()
    codes = expected["codes"][0]
    with torch.no_grad():
        known, walk = condition(case, prior, 0), Walk(*codes.shape[1:])
        logits = torch.stack([prior.step(codes, walk, known) for _ in walk], dim=2)
    assert_close(logits.reshape(expected["logits"].shape), expected["logits"])


@cases("prior")
def test_greedy_decoding_gives_the_published_loops_codes(case: Case) -> None:
    expected, prior = case.tensors, prior_of(case).eval()
    batch, height, width = expected["greedy_codes"].shape
    above = [expected["condition"][0]] if "condition" in expected else []
    codes = prior.draw(torch.randn(batch, 1, height, width), above, temperature=0)
    assert torch.equal(codes, expected["greedy_codes"])


@cases("prior")
@torch.no_grad()
def test_a_prior_sees_what_the_published_one_sees(case: Case) -> None:
    expected, prior = case.tensors, prior_of(case).eval()
    codes, known = expected["codes"][0], condition(case, prior, 0)
    positions = codes[0].numel()
    changed = codes.repeat(positions, 1, 1, 1)  # (P, B, h, w), the code at position j of copy j another one
    for j in range(positions):
        flat = changed[j].flatten(1)
        flat[:, j] = (flat[:, j] + 1) % prior.shape.codes
    seen = [(prior(other, known) != prior(codes, known)).any(1).any(0).flatten() for other in changed]
    assert torch.equal(torch.stack(seen, dim=1), expected["sees"].bool())


@cases("prior")
def test_a_prior_trained(case: Case) -> None:
    h, expected, prior = case.facts, case.tensors, prior_of(case).train()
    optimiser = torch.optim.Adam(prior.parameters(), lr=h["lr"])
    for number, (loss, norm) in enumerate(zip(h["loss"], h["gradient_norm"], strict=True)):
        codes = expected["codes"][number]
        found = F.cross_entropy(prior(codes, condition(case, prior, number)), codes)
        optimiser.zero_grad()
        found.backward()
        assert_close(found, loss)
        assert_close(gradient_norm(prior), norm)
        optimiser.step()
    with torch.no_grad():
        assert_close(prior.eval()(expected["codes"][0], condition(case, prior, 0)), expected["after.logits"])


# --------------------------------------------------------------------------------------------------------- both ways


@cases(*MAPS)
def test_a_network_goes_back_bit_for_bit(case: Case) -> None:
    network = network_of(case, averages="from_zero")
    assert_equal(foreign_network(network), case.state_dict())


def config_of(case: Case) -> VQVAEConfig:
    """The config of the model, whose images are squares."""
    h = case.facts
    heights = [case.tensors[name].shape[-2] for name in ("images", *MAPS[h["kind"]])]
    return VQVAEConfig(
        image_size=heights[0],
        image_channels=h["channels"],
        likelihood=LikelihoodConfig(kind="squared_error"),
        factors=tuple(larger // smaller for larger, smaller in pairwise(heights)),
        channels=h["hidden"],
        residual_channels=h["residual"],
        blocks=h["blocks"],
        relu_before_blocks=h["kind"] == "network_one_level",
        quantiser=QuantiserConfig(codes=h["codes"], dim=h["dim"]),
    )


class Recipe(Config):
    model: VQVAEConfig


@cases(*MAPS)
def test_the_one_door_loads_and_converts_it_with_a_config(case: Case, tmp_path: Path) -> None:
    if len(set(case.tensors["images"].shape[-2:])) > 1:
        pytest.skip("a family's images are squares")
    file, recipe = case.folder / "model.pt", tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(Recipe(model=config_of(case))))
    with pytest.raises(UserError, match="carries no hyper-parameters"):
        load_model(file)
    assert load_model(file, config=recipe).density == "none"
    convert(file, tmp_path / "ours.pt", config=recipe)
    convert(tmp_path / "ours.pt", tmp_path / "back.pt")
    assert_equal(read_safely(tmp_path / "back.pt"), case.state_dict())


@cases("prior")
def test_a_prior_goes_back_bit_for_bit(case: Case) -> None:
    assert_equal(foreign_prior(prior_of(case)), case.state_dict())


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
