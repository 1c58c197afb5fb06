"""Penalties on the weights: largest singular values and batch-norm scales (spec §5; Yoshida & Miyato 2017; paper §3.3).

Shapes: N convolutions of one kernel shape, O outputs, R = C/groups · kh · kw.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.randomness import generator
from ..kernels.fusion import fused


class SpectralPenalty(nn.Module):
    """Σ of the largest singular values of all effective kernels, each flattened to (O, R), by power iteration.

    The left vectors u are kept between steps and saved with the model; 40 iterations the first time, then 4 a step.
    """

    first_iterations, iterations = 40, 4

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """`shapes`: (N, O) of each batch of matrices, by its key in `EffectiveWeights.matrices`."""
        super().__init__()
        for key, shape in shapes.items():
            self.register_buffer(f"u_{key}", torch.zeros(shape))
        self._started: bool | None = False  # None: the buffers tell
        self.register_load_state_dict_post_hook(_forget_start)  # type: ignore[no-untyped-call]

    def forward(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """Σ σ_max over matrices (N, O, R), a scalar; the gradient for a matrix is u vᵀ. Advances the vectors.

        In float32 or more, whatever the autocast.
        """
        iterations = self.iterations if self._has_started() else self.first_iterations
        device = next(iter(matrices.values())).device
        total = torch.zeros((), device=device)
        advanced: list[Tensor] = []
        with torch.autocast(device.type, enabled=False):
            for key, matrix in matrices.items():
                u, v = _iterate(matrix, self.get_buffer(f"u_{key}"), iterations)
                advanced.append(u)
                # uᵀ W v with u and v held fixed: its derivative by W is u vᵀ.
                total = total + (u[:, None] @ matrix @ v[:, :, None]).sum()
            with torch.no_grad():
                torch._foreach_copy_([self.get_buffer(f"u_{key}") for key in matrices], advanced)
        self._started = True
        return total

    def _has_started(self) -> bool:
        """False until the first iterations, in this run or in the one that saved the vectors."""
        if self._started is None:
            self._started = any(bool(buffer.any()) for buffer in self.buffers())
        if not self._started:
            self._randomise()
        return self._started

    def _randomise(self) -> None:
        for name, buffer in self.named_buffers():
            start = torch.randn(buffer.shape, generator=generator("cpu", "spectral", name))
            buffer.copy_(F.normalize(start, dim=1))


@torch.no_grad()
def _iterate(matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Power iterations v ← Wᵀ u, u ← W v, normalised; u (N, O) and v (N, R)."""
    for _ in range(iterations):
        v = _directions((u[:, None] @ matrix).squeeze(1))
        u = _directions((matrix @ v[:, :, None]).squeeze(2))
    return u, v


@fused(dynamic=True, few=True)
def _directions(vectors: Tensor) -> Tensor:
    """The rows of (N, R) at length 1."""
    return F.normalize(vectors, dim=1)


def _forget_start(module: nn.Module, incompatible: Any) -> None:
    module._started = None  # type: ignore[assignment]


def batch_norm_penalty(scales: Iterable[Tensor]) -> Tensor:
    """Σ over batch norms of max|γ| (spec §5), a scalar, 0 without any. `scales`: each norm's γ (C,)."""
    widths: dict[int, list[Tensor]] = {}
    for scale in scales:
        widths.setdefault(len(scale), []).append(scale)
    largest = [torch.stack(group).abs().amax(1) for group in widths.values()]  # (norms) of each width
    return torch.cat(largest).sum() if largest else torch.zeros(())
