"""Where the first non-finite number of a training step comes from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.distributed import gather_objects, is_distributed


def first_non_finite(model: nn.Module, images: Tensor, loss: Callable[[], Tensor]) -> str:
    """What first stops being finite when `loss` runs the model on images, in words.

    It looks, in this order, at the images, the weights, the modules' outputs, the loss, the gradients at the modules'
    outputs and those of the weights. All ranks must call it, for batch norms meet; they get the same answer.
    """
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    search = _Search()
    search.look("the images of the batch", images)
    for name, weight in weights.items():
        search.look(f"the weight '{name}'", weight)
    with search.hooked_to(model):
        value = loss()
        search.look("the loss", value)
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            search.look(f"the gradient of '{name}'", gradient)
    found = [(*first, rank) for rank, first in enumerate(gather_objects(search.first)) if first is not None]
    if not found:
        return "nothing any more, when the last batch was computed again"
    _, words, rank = min(found)
    return f"{words} (rank {rank})" if is_distributed() else words


class _Search:
    """Looks at tensors in an order that is the same on every rank, and keeps the first that is not finite."""

    def __init__(self) -> None:
        self.looks = 0
        self.first: tuple[int, str] | None = None

    def look(self, words: str, tensor: Tensor) -> None:
        self.looks += 1
        if self.first is None and not bool(tensor.isfinite().all()):
            self.first = (self.looks, words)

    @contextmanager
    def hooked_to(self, model: nn.Module) -> Iterator[None]:
        """Within, every module's output is looked at as it comes, then its gradient."""

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    self.look(f"the output of '{name}'", output)
                    if output.requires_grad:
                        output.register_hook(  # type: ignore[no-untyped-call]
                            lambda gradient: self.look(f"the gradient at '{name}'", gradient)
                        )

            return hook

        hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
