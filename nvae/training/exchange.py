"""How ranks exchange gradients: in flat buckets, each on its way as soon as it is full (Li et al. 2020)."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ..core.distributed import is_distributed

Exchange = Literal["fp32", "bf16"]


def parallel(model: nn.Module, device: torch.device, exchange: Exchange) -> nn.Module:
    """The model, or where there are several ranks the model that averages its gradients over them, sent in a type."""
    if not is_distributed():
        return model
    # Strides along sides of length 1, which mean nothing, differ between a 1×1 kernel's gradient and its bucket.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [device.index] if device.type == "cuda" else None
    options: dict[str, Any] = {_BUFFERS_OPTION: False}
    exchanging = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)
    if exchange == "bf16":
        exchanging.register_comm_hook(None, bf16_compress_hook)
    return exchanging


def exchanging(model: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
    """Within, gradients of a `parallel` model are on their way to other ranks as they come, or stay on their rank."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


_BUFFERS_OPTION = (  # whether rank 0 hands out its buffers in every pass; older versions call it otherwise
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
