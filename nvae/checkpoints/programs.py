"""A model as programs that need PyTorch alone, or only an ONNX runtime: a sampler and an encoder (`torch.export`).

Both take and give float32 tensors on the CPU, of batches of any size. Images are (B, C, H, W) in [0, 1], without the
border that is padding.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..bricks.inference import for_tracing
from ..core.errors import UserError
from ..kernels.operations import using
from ..models.base import Family

TRACED = 2
"""Images of the batch that is traced; one would be taken for a constant."""
LARGE = 2**30
"""Bytes of weights from which on an ONNX file keeps them in a file beside it: it may have 2 GiB."""


class Sampler(nn.Module):
    """Standard-normal noise of every group (B, L, h, w), top-down, and a temperature () -> mean images."""

    def __init__(self, model: Family[Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Sequence[Tensor], temperature: Tensor) -> Tensor:
        """The means of p(x | z) at z drawn by the noise, every prior's σ times the temperature (spec §7)."""
        groups = self.model.top_down(n=noise[0].shape[0])
        for epsilon in noise:
            prior = groups.prior()
            groups.enter(prior.mean + temperature * prior.sigma * epsilon)
        likelihood = groups.likelihood()
        return likelihood.visible(likelihood.mean())


class Encoder(nn.Module):
    """Images -> z (B, L, h, w) of every group, top-down, each at its posterior's mean given those above."""

    def __init__(self, model: Family[Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The means are those before a group's flows, the z what the flows make of them."""
        groups = self.model.top_down(self.model.encode(F.pad(images, [self.model.config.likelihood.border] * 4)))
        latents = []
        for _ in self.model.latent_shapes(1):
            latents.append(groups.flowed(groups.posterior().mean))
            groups.enter(latents[-1])
        return tuple(latents)


def require_programs(model: Family[Any]) -> None:
    """Raises UserError for a model that no such program can be made of."""
    name = type(model).__name__
    if model.latent_kind != "normal":
        raise UserError(f"--program: a {name} has discrete latents, drawn one after the other; only Normal ones can be")
    if not model.config.knows_unlabelled:
        raise UserError(f"--program: this {name} knows no images without a class (model.label_dropout=0), programs do")
    with torch.no_grad():
        model.top_down()


def sampler_of(model: Family[Any]) -> ExportedProgram:
    """The program of `Sampler`."""
    noise = [torch.zeros(shape) for shape in model.latent_shapes(TRACED)]
    batch = Dim("batch")
    return _traced(Sampler, model, (noise, torch.tensor(1.0)), ([{0: batch} for _ in noise], None))


def encoder_of(model: Family[Any]) -> ExportedProgram:
    """The program of `Encoder`."""
    config = model.config
    images = torch.zeros(TRACED, config.image_channels, config.visible_size, config.visible_size)
    return _traced(Encoder, model, (images,), ({0: Dim("batch")},))


def _traced(kind: Any, model: Family[Any], inputs: Any, dynamic: Any) -> ExportedProgram:
    require_programs(model)
    with using("plain"), torch.no_grad():
        program = torch.export.export(kind(for_tracing(model)), inputs, dynamic_shapes=dynamic)
    return _without_unused(program)


def _without_unused(program: ExportedProgram) -> ExportedProgram:
    """The program itself, without the weights that it does not use: a sampler needs none of the encoder's."""
    graph, specs = program.graph, program.graph_signature.input_specs
    of_model = {spec.arg.name: spec for spec in specs if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in of_model and not node.users:
            graph.erase_node(node)
            specs.remove(of_model[node.name])
            program.state_dict.pop(str(of_model[node.name].target), None)
            program.constants.pop(str(of_model[node.name].target), None)
    program.graph_module.recompile()
    return program


def packed(program: ExportedProgram) -> bytes:
    """A program as the file that `torch.export.load` reads."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_of(program: ExportedProgram, folder: Path) -> None:
    """Writes a sampler's program as sampler.onnx: inputs noise_0, noise_1, … and temperature, output images.

    Raises UserError where the packages for it are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx: {error.name} is not installed; pip install 'nvae[onnx]'") from error
    made = torch.onnx.export(program, dynamo=True, output_names=["images"], verbose=False)
    assert made is not None
    size = sum(weight.nbytes for weight in program.state_dict.values())
    made.save(folder / "sampler.onnx", external_data=size > LARGE)
