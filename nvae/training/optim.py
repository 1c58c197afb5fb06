"""Optimisers, the learning-rate schedule, gradient limits and weight averaging (spec §5)."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..checkpoints.loading import unlike
from ..core.config import Config
from ..core.errors import UserError
from .adamax import Adamax

APEX_HELP = (
    "optim.name: fused_adam is NVIDIA apex's, which is not installed. Build it from https://github.com/NVIDIA/apex "
    '(pip install -v --no-build-isolation --config-settings "--build-option=--cuda_ext" .); '
    'the package called "apex" on the Python index is something else'
)


class OptimConfig(Config):
    name: Literal["adamax", "adamw", "fused_adam"] = "adamax"
    """`adamax` with L2 weight decay (NVAE), `adamw` with decoupled decay, `fused_adam`: apex's AdamW, for CUDA."""
    lr: float = Field(1e-2, gt=0)
    """Learning rate after warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: a half cosine down to `lr_min` at the end, or `lr` throughout."""
    lr_min: float = Field(1e-4, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(5.0, ge=0)
    """Epochs over which the learning rate grows linearly from 0."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same in updates; takes the place of `warmup_epochs`."""
    lr_batch: int | None = Field(None, ge=1)
    """Global batch for which `lr` is meant: with another one, lr is scaled in proportion. None: lr as it is."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-3, gt=0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(3e-4, ge=0)
    """On every parameter: L2 in the gradient (adamax), decoupled (adamw, fused_adam)."""
    clip_norm: float | None = Field(None, gt=0)
    """Scale gradients down to this global L2 norm. None: no clipping."""
    skip_norm: float | None = Field(None, gt=0)
    """Skip an update whose gradient norm, before clipping, is above this."""
    skip_quantile: float | None = Field(None, gt=0, lt=1)
    """Skip an update whose gradient norm is above `skip_factor` times this quantile of the last `skip_window` norms."""
    skip_factor: float = Field(3.0, ge=1)
    """See `skip_quantile`."""
    skip_window: int = Field(200, ge=10)
    """See `skip_quantile`; nothing is skipped by it before a quarter of the window is filled."""
    skip_limit: int = Field(10, ge=1)
    """After this many skips in a row by a threshold the next update is made all the same."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per update of the exponential moving average of the weights; evaluation and sampling use it. None: off."""

    def idle(self) -> dict[str, str]:
        found = {} if self.schedule == "cosine" else {"lr_min": "the schedule is constant"}
        if self.skip_quantile is None:
            found |= dict.fromkeys(("skip_factor", "skip_window"), "there is no skip_quantile")
            if self.skip_norm is None:
                found["skip_limit"] = "there is neither skip_norm nor skip_quantile"
        return found


def build_optimiser(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser, multi-tensor, over all parameters that take gradients."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamax":
        return Adamax(trained, **options)
    if config.name == "adamw":
        return torch.optim.AdamW(trained, foreach=True, **options)
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(APEX_HELP) from error
    optimiser: torch.optim.Optimizer = FusedAdam(trained, adam_w_mode=True, **options)
    return optimiser


class Schedule:
    """Learning rate of each update: linear warm-up from 0, then constant or a half cosine to `lr_min` (spec §5)."""

    def __init__(self, config: OptimConfig, total_steps: int, steps_per_epoch: float, global_batch: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.scale = 1.0 if config.lr_batch is None else global_batch / config.lr_batch
        steps = config.warmup_steps
        self.warmup = round(config.warmup_epochs * steps_per_epoch) if steps is None else steps

    def __call__(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        return self.scale * self._unscaled(step)

    def _unscaled(self, step: int) -> float:
        config = self.config
        if step < self.warmup:
            return config.lr * step / self.warmup
        if config.schedule == "constant":
            return config.lr
        done = (step - self.warmup) / max(self.total_steps - self.warmup, 1)
        return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class SkipRule:
    """Whether an update's gradient norm is too large, by a fixed or an adaptive threshold, but never for ever."""

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=config.skip_window)
        self.in_a_row = 0

    def skips(self, norm: float) -> bool:
        """True when the update of this finite norm should be skipped; remembers the norm."""
        too_large = norm > self._threshold()
        self.norms.append(norm)
        self.in_a_row = self.in_a_row + 1 if too_large and self.in_a_row < self.config.skip_limit else 0
        return self.in_a_row > 0

    def _threshold(self) -> float:
        config = self.config
        threshold = config.skip_norm or math.inf
        if config.skip_quantile is not None and len(self.norms) >= config.skip_window // 4:
            recent = torch.tensor(self.norms, dtype=torch.float64)
            threshold = min(threshold, config.skip_factor * float(recent.quantile(config.skip_quantile)))
        return threshold

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]


class Averaged:
    """An exponential moving average of a model's parameters and floating-point buffers.

    Other buffers are copied, and so is what `copied` names.
    """

    def __init__(self, model: nn.Module, decay: float, copied: Collection[str] = ()) -> None:
        self.decay = decay
        self.model = model.state_dict()  # the model's own memory, under the same names
        self.tensors = {name: tensor.clone() for name, tensor in self.model.items()}
        self._floating = [name for name, t in self.model.items() if t.is_floating_point() and name not in copied]
        self._others = list(self.model.keys() - self._floating)

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay · average + (1 − decay) · model."""
        averages, current = self._lists(self._floating)
        torch._foreach_lerp_(averages, current, 1 - self.decay)
        if self._others:
            torch._foreach_copy_(*self._lists(self._others))

    @torch.no_grad()
    def restart(self) -> None:
        """Starts anew from the model's weights."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.model[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within, the model has the averaged weights, and its own are kept here; bit for bit undone at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.tensors.items():
            own = self.model[name].clone()
            self.model[name].copy_(tensor)
            tensor.copy_(own)

    def _lists(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.tensors[name] for name in names], [self.model[name] for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, as a model's own state."""
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over saved averages. Raises UserError for those of another model."""
        reason = unlike(self.tensors, state)
        if reason is None and (missing := self.tensors.keys() - state.keys()):
            reason = f"'{min(missing)}' is missing"
        if reason is not None:
            raise UserError(f"the averaged weights are of another model: {reason}")
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
