"""Adamax over all parameters at once (Kingma & Ba 2015, algorithm 2, with L2 weight decay; spec §5).

The moments of all parameters lie one behind the other in one piece of memory. A step is then a few passes over it
all, where torch's makes a few for each of a thousand small tensors.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn


class Adamax(torch.optim.Adamax):
    """`torch.optim.Adamax` to the last few bits, with its options `lr`, `betas`, `eps` and `weight_decay`.

    Its state dicts are torch's, too. A parameter without gradient is passed over, as there.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._blocks: dict[int, list[_Block]] = {}  # by number of the parameter group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; takes no closure."""
        for number, group in enumerate(self.param_groups):
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not _covers(self._blocks.get(number, []), trained):
                self._blocks[number] = self._gathered(trained)
            for block in self._blocks[number]:
                block.step(group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        self._count()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state."""
        super().load_state_dict(state_dict)
        self._blocks = {}

    def _gathered(self, trained: list[nn.Parameter]) -> "list[_Block]":
        """The parameters in blocks of one type, device and number of updates; their state moves there."""

        def kind(parameter: nn.Parameter) -> tuple[str, str, float]:
            return str(parameter.dtype), str(parameter.device), float(self.state[parameter].get("step", 0))

        self._count()
        blocks = []
        for (_, _, updates), parameters in groupby(sorted(trained, key=kind), key=kind):
            block = _Block(list(parameters), updates)
            for parameter, own in zip(block.parameters, block.states, strict=True):
                for name, kept in self.state[parameter].items():
                    own[name].copy_(kept)
                self.state[parameter] = own
            blocks.append(block)
        return blocks

    def _count(self) -> None:
        """Writes each parameter's number of updates, kept once a block, into its state."""
        for block in (block for blocks in self._blocks.values() for block in blocks):
            for own in block.states:
                own["step"].fill_(block.updates)


def _covers(blocks: "list[_Block]", parameters: list[nn.Parameter]) -> bool:
    """True where the blocks hold these parameters and no others."""
    return {id(parameter) for block in blocks for parameter in block.parameters} == set(map(id, parameters))


class _Block:
    """Parameters of one type, device and number of updates, with their moments side by side."""

    def __init__(self, parameters: list[nn.Parameter], updates: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.updates = updates
        size = sum(parameter.numel() for parameter in parameters)
        self.first, self.largest, self.scratch = (parameters[0].new_zeros(size) for _ in range(3))
        self.pieces = self._pieces(self.scratch)
        moments = zip(self._pieces(self.first), self._pieces(self.largest), strict=True)
        self.states: list[dict[str, Tensor]] = [
            {"step": torch.tensor(updates), "exp_avg": first, "exp_inf": largest} for first, largest in moments
        ]
        """Each parameter's part, under torch's names; "step" is brought up to date where it is asked for."""

    def step(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """m ← β₁ m + (1 − β₁) g; u ← max(β₂ u, |g| + eps); w ← w − lr/(1 − β₁ᵗ) · m/u, with g that of w plus decay."""
        torch._foreach_copy_(self.pieces, [cast(Tensor, parameter.grad) for parameter in self.parameters])
        if weight_decay:
            torch._foreach_add_(self.pieces, self.parameters, alpha=weight_decay)
        self.updates += 1
        self.first.lerp_(self.scratch, 1 - betas[0])
        torch.maximum(self.largest.mul_(betas[1]), self.scratch.abs_().add_(eps), out=self.largest)
        torch.div(self.first, self.largest, out=self.scratch)
        torch._foreach_add_(self.parameters, self.pieces, alpha=-lr / (1 - betas[0] ** self.updates))

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]
