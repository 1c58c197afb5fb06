"""Everything that changes in training, in one object that saves and restores it all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints.loading import load_weights
from ..models.base import Family, FirstImages
from .fitting import require_moments, require_numbers, require_parts
from .optim import Averaged, SkipRule


@dataclass(eq=False)
class TrainingState:
    """Random numbers need no state here: they follow from (seed, stream, image) and (seed, rank, step)."""

    model: Family[Any]
    optimiser: torch.optim.Optimizer
    skip_rule: SkipRule
    average: Averaged | None
    scaler: torch.amp.GradScaler

    begun: bool = False
    """Whether the model has what it starts from: `Family.begin`, or weights that were trained before."""
    step: int = 0
    """Updates tried so far."""
    images_seen: int = 0
    """Over all ranks."""
    skipped: int = 0
    """Updates not made because of their gradient norm."""
    non_finite: int = 0
    """Updates not made because of a non-finite number."""
    non_finite_in_a_row: int = 0
    returns: int = 0
    """To the last good checkpoint."""
    lr_factor: float = 1.0
    """Halved at every return."""
    watched: int = 0
    """The last step at which validation and pictures, where due, were done."""
    log_lines: int = 0
    """Lines of metrics.jsonl that were written by the time of this state."""
    best: float = float("inf")
    """Lowest validation bound, nats."""

    counters: ClassVar = (
        "begun",
        "step",
        "images_seen",
        "skipped",
        "non_finite",
        "non_finite_in_a_row",
        "returns",
        "lr_factor",
        "watched",
        "log_lines",
        "best",
    )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers."""
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "skip_rule": self.skip_rule.state_dict(),
            "counters": {name: getattr(self, name) for name in self.counters},
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; learning rate, decay and the like stay as configured now.

        An average that was not kept before starts from the weights. Earlier versions did not say whether the model had
        begun: it had, once there was an update. Raises UserError for weights of another model, and for what is no
        state of a run.
        """
        require_parts(content)
        counters = {"begun": content["counters"].get("step", 0) != 0, **content["counters"]}
        require_numbers("counters", counters, {name: getattr(self, name) for name in self.counters})
        require_numbers("skip_rule", content["skip_rule"], self.skip_rule.state_dict())
        require_numbers("scaler", content["scaler"], dict.fromkeys(content["scaler"], 0.0))
        load_weights(self.model, content["model"])
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        require_moments(content["optimiser"], parameters)
        if self.average is not None:
            self.average.load_state_dict(content.get("ema") or content["model"])
        own = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": content["optimiser"], "param_groups": own})
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.skip_rule.load_state_dict(content["skip_rule"])
        for name in self.counters:
            setattr(self, name, counters[name])

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """A warm start: these weights, and the average begins with them. Raises UserError for another model's."""
        load_weights(self.model, weights)
        self._has_begun()

    def begin(self, first: FirstImages) -> None:
        """What the family sets from data, and the average begins with it."""
        self.model.begin(first)
        self._has_begun()

    def _has_begun(self) -> None:
        self.begun = True
        if self.average is not None:
            self.average.restart()

    def tensors(self) -> dict[str, Tensor]:
        """Model, average and optimiser by name."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            named |= {f"ema.{name}": tensor for name, tensor in self.average.tensors.items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            named |= {f"optimiser.{index}.{name}": slot for name, slot in slots.items() if isinstance(slot, Tensor)}
        return named

    def is_finite(self) -> bool:
        """True when every number of model, average and optimiser is."""
        device = next(self.model.parameters()).device
        tensors = [t for t in self.tensors().values() if t.is_floating_point() and t.device == device and t.numel()]
        largest = torch._foreach_norm(tensors, torch.inf)
        return bool(torch.stack([norm.float() for norm in largest]).isfinite().all())


class BufferCopy:
    """A model's persistent buffers as they were before an update, to undo what a discarded one did to them."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
        self.model = model
        self.copies = {name: tensor.clone() for name, tensor in buffers.items()}
        self._by_type: list[tuple[list[Tensor], list[Tensor]]] = []
        for dtype in {tensor.dtype for tensor in buffers.values()}:
            names = [name for name, tensor in buffers.items() if tensor.dtype == dtype]
            self._by_type.append(([self.copies[name] for name in names], [buffers[name] for name in names]))

    def take(self) -> None:
        """Remembers the buffers of now, in one call per type whatever their number."""
        for copies, buffers in self._by_type:
            torch._foreach_copy_(copies, buffers)

    def put_back(self) -> None:
        """Undoes everything since, by way of `load_state_dict`: modules then forget what they knew of their buffers."""
        self.model.load_state_dict(self.copies, strict=False)
