"""Programs: a sampler and an encoder that say what the model says, where there is no nvae."""

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS
from model_folders import FAMILIES, model_of
from torch import Tensor
from torch.export import ExportedProgram

from nvae.bricks.inference import for_tracing
from nvae.bricks.normalisation import BatchNorm
from nvae.checkpoints.programs import encoder_of, onnx_of, packed, sampler_of
from nvae.core.errors import UserError
from nvae.core.randomness import keyed_normal
from nvae.models.base import Family
from nvae.models.nvae.config import NVAEConfig
from nvae.models.registry import build

MEASURED = {"input_mean": 100.0, "input_std": 50.0}
"""What the training images of a Very Deep VAE might have."""
ALONE = """
import sys, torch
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "nvae", name

sys.meta_path.insert(0, Refuse())
inputs = torch.load("inputs.pt")
sampler = torch.export.load("sampler.pt2").module()
encoder = torch.export.load("encoder.pt2").module()
for given in inputs:
    given["pictures"] = sampler(given["noise"], given["temperature"])
    given["latents"] = encoder(given["images"])
torch.save(inputs, "outputs.pt")
"""


def lived_in(model: Family[Any]) -> Family[Any]:
    """The model, with statistics in its batch norms as if it had been trained."""
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def noise_for(model: Family[Any], n: int) -> list[Tensor]:
    return keyed_normal(model.latent_shapes(n), range(n), 0, "noise", torch.device("cpu"))


@torch.no_grad()
def sampled(model: Family[Any], noise: list[Tensor], temperature: float) -> Tensor:
    """What the model draws."""
    likelihood = model.sample(len(noise[0]), temperature, noise)
    return likelihood.visible(likelihood.mean())


@torch.no_grad()
def encoded(model: Family[Any], images: Tensor) -> list[Tensor]:
    """z of each group at its posterior's mean: a draw with noise of zeros."""
    padded = F.pad(images, [model.config.likelihood.border] * 4)
    return model(padded, noise=[torch.zeros(shape) for shape in model.latent_shapes(len(images))]).z


def images_for(model: Family[Any], n: int) -> Tensor:
    size = model.config.visible_size
    return torch.rand(n, model.config.image_channels, size, size).round()


def require_same(model: Family[Any], sampler: Callable[..., Any], encoder: Callable[..., Any]) -> None:
    for n, temperature in ((1, 0.0), (2, 0.7), (5, 1.0)):
        noise, images = noise_for(model, n), images_for(model, n)
        pictures = sampler(noise, torch.tensor(temperature))
        torch.testing.assert_close(pictures, sampled(model, noise, temperature), rtol=0, atol=1e-5)
        torch.testing.assert_close(list(encoder(images)), encoded(model, images), rtol=1e-5, atol=1e-5)


def loaded(program: ExportedProgram) -> Callable[..., Any]:
    module: Callable[..., Any] = torch.export.load(io.BytesIO(packed(program))).module()
    return module


class Exported(NamedTuple):
    """A model and what was made of it."""

    model: Family[Any]
    sampler: ExportedProgram
    encoder: ExportedProgram


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Of an NVAE of two scales with flows and a border."""
    torch.manual_seed(0)
    likelihood = {"kind": "bernoulli", "border": 1}
    model = lived_in(model_of(FAMILIES["nvae"] | {"image_channels": 1, "likelihood": likelihood}))
    return Exported(model, sampler_of(model), encoder_of(model))


@pytest.mark.slow
def test_both_say_what_the_model_says(exported: Exported) -> None:
    require_same(exported.model, loaded(exported.sampler), loaded(exported.encoder))


@pytest.mark.slow
def test_both_of_a_very_deep_vae_do() -> None:
    model = model_of(FAMILIES["very deep"] | MEASURED)
    require_same(model, loaded(sampler_of(model)), loaded(encoder_of(model)))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_both_of_every_kind_of_model_do(kind: dict[str, Any], tiny_config: Callable[..., NVAEConfig]) -> None:
    model = lived_in(build(tiny_config(**kind)))
    require_same(model, loaded(sampler_of(model)), loaded(encoder_of(model)))


@pytest.mark.slow
def test_they_run_where_there_is_no_nvae(exported: Exported, tmp_path: Path) -> None:
    model = exported.model
    (tmp_path / "sampler.pt2").write_bytes(packed(exported.sampler))
    (tmp_path / "encoder.pt2").write_bytes(packed(exported.encoder))
    temperature = torch.tensor(0.7)
    inputs: list[dict[str, Any]] = [
        {"noise": noise_for(model, n), "temperature": temperature, "images": images_for(model, n)} for n in (1, 3)
    ]
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(ALONE)], cwd=tmp_path, check=True)
    for given in torch.load(tmp_path / "outputs.pt"):
        torch.testing.assert_close(given["pictures"], sampled(model, given["noise"], 0.7), rtol=0, atol=1e-5)
        torch.testing.assert_close(list(given["latents"]), encoded(model, given["images"]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_their_operators_are_pytorchs(exported: Exported) -> None:
    for program in (exported.sampler, exported.encoder):
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if "nvae" in name]


@pytest.mark.slow
def test_a_sampler_has_no_weights_of_the_encoder(exported: Exported) -> None:
    names = exported.sampler.state_dict.keys()
    assert "model.head.weight" in names
    assert not [name for name in names if ".encoder_cells." in name or "preprocess" in name or "spectral" in name]


def test_the_model_that_is_traced_stays_as_it_was() -> None:
    model = lived_in(model_of(FAMILIES["nvae"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for_tracing(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["codes", "prior"])
def test_discrete_latents_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--program: a VQVAE\w* has discrete latents, drawn one after the other"):
        sampler_of(model_of(FAMILIES[name]))


def test_a_model_that_must_know_a_class_is_refused() -> None:
    model = model_of(FAMILIES["nvae"] | {"classes": 3, "label_dropout": 0.0})
    with pytest.raises(UserError, match=r"^--program: this NVAE knows no images without a class"):
        sampler_of(model)


@pytest.mark.slow
def test_of_a_model_of_classes_they_are_of_none() -> None:
    model = model_of(FAMILIES["very deep"] | MEASURED | {"classes": 3})
    noise = noise_for(model, 2)
    pictures = sampler_of(model).module()(noise, torch.tensor(1.0))
    torch.testing.assert_close(pictures, sampled(model, noise, 1.0), rtol=0, atol=1e-5)


def require_same_in_onnx(model: Family[Any], sampler: ExportedProgram, folder: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx_of(sampler, folder)
    session = runtime.InferenceSession(folder / "sampler.onnx")
    for n in (1, 3):
        noise = noise_for(model, n)
        inputs = {f"noise_{group}": epsilon.numpy() for group, epsilon in enumerate(noise)}
        (pictures,) = session.run(["images"], inputs | {"temperature": torch.tensor(0.7).numpy()})
        torch.testing.assert_close(torch.from_numpy(pictures), sampled(model, noise, 0.7), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_onnx_runtime_draws_what_the_model_draws(exported: Exported, tmp_path: Path) -> None:
    require_same_in_onnx(exported.model, exported.sampler, tmp_path)


@pytest.mark.full
def test_an_onnx_runtime_draws_what_a_very_deep_vae_draws(tmp_path: Path) -> None:
    model = model_of(FAMILIES["very deep"] | MEASURED)
    require_same_in_onnx(model, sampler_of(model), tmp_path)


def test_without_the_packages_for_onnx_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    program: Any = None
    with pytest.raises(UserError, match=r"^--onnx: onnx is not installed; pip install 'nvae\[onnx\]'$"):
        onnx_of(program, tmp_path)
