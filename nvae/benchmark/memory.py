"""Memory of a training step, counted without allocating it: the shapes of its tensors tell.

On fake tensors a step of the largest recipe runs in seconds anywhere. What a convolution's algorithm needs as
workspace is not counted.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..bricks.regularizers import SpectralPenalty
from ..kernels.operations import is_plain
from ..models.base import Family, Metrics, Output, Recomputation
from ..models.config import ModelConfig
from ..models.registry import build
from .published_vdvae import as_published


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the weights, their averages and the optimiser's moments."""

    kept: int
    """Alive once the loss is there: what is kept for the backward pass."""
    peak: int
    """Most that is alive in the backward pass, gradients of the weights included."""


def step_memory(
    config: ModelConfig, batch: int = 1, recompute: Recomputation = "none", precision: torch.dtype | None = None
) -> StepMemory:
    """The memory of one training step on a batch; `precision` is autocast's type, none for float32 throughout."""
    with FakeTensorMode():
        model, images, noise = _inputs(config, batch, recompute)
        with LiveBytes(apart=model) as bytes_:
            loss, others = _step(model, images, noise, precision)
            kept = bytes_.peak = bytes_.live
            loss.backward()  # type: ignore[no-untyped-call]
            del others
    return StepMemory(kept, bytes_.peak)


def saved_bytes(
    config: ModelConfig,
    batch: int = 1,
    recompute: Recomputation = "none",
    precision: torch.dtype | None = None,
) -> int:
    """What autograd saves for the backward pass of a step, by its own account: saved-tensor hooks see each tensor.

    A storage counts once; weights and buffers do not. The difference of two batches is what an image takes.
    Plainly, it is that of the published arithmetic where the family has one of its own.
    """
    with FakeTensorMode():
        model, images, noise = _inputs(config, batch, recompute)
        model = as_published(model) if is_plain() else model
        apart = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        saved: dict[int, Tensor] = {}  # by storage; held, lest another storage take its place in memory

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in apart:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _step(model, images, noise, precision)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _inputs(config: ModelConfig, batch: int, recompute: Recomputation) -> tuple[Family[Any], Tensor, list[Tensor]]:
    """A model in training mode, images and noise."""
    model = build(config).train()
    model.set_recomputation(recompute)
    for part in model.modules():
        if isinstance(part, SpectralPenalty):
            part.first_iterations = part.iterations  # more of them take as much memory, and minutes here
    images = torch.zeros(batch, config.image_channels, config.image_size, config.image_size)
    return model, images, [torch.zeros(shape) for shape in model.latent_shapes(model.draws * batch)]


def _step(
    model: Family[Any], images: Tensor, noise: list[Tensor], precision: torch.dtype | None
) -> tuple[Tensor, tuple[Output, Metrics]]:
    """The loss, and what a trainer has besides."""
    with torch.autocast("cpu", dtype=precision) if precision else nullcontext():
        output = model(images, noise)
    loss, metrics = model.loss(output, progress=1.0)
    return loss, (output, metrics)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, counts the bytes of all storage that operators make, as long as a tensor uses it."""

    def __init__(self, apart: nn.Module) -> None:
        """`apart`: its parameters and buffers are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Now."""
        self.peak = 0
        """At the most."""
        self._apart = {tensor.untyped_storage()._cdata for tensor in (*apart.parameters(), *apart.buffers())}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched or key in self._apart:
            return

        def freed(reference: Any) -> None:
            self.live -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
