"""Who looks on while tensors are computed."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def watched(x: Tensor) -> bool:
    """True where somebody watches every operator: a FLOP counter, fake tensors."""
    return isinstance(x, FakeTensor) or _get_current_dispatch_mode() is not None
