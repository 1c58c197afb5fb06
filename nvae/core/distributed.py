"""Ranks: the process group that torchrun describes, and the few reductions the rest of the code needs.

One process needs no process group: every function here is then the identity. `all_mean` is the only one through
which gradients flow, and with `summed` the only one that a pass through bricks may use.
"""

import datetime
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError


def is_distributed() -> bool:
    """True when several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def start(device: torch.device, timeout_minutes: float) -> torch.device:
    """Joins the process group torchrun's environment describes (none for one process); returns this rank's device.

    That is the `device` given; of CUDA without a number, the one of the rank's. A collective that waits longer than
    `timeout_minutes` ends the process instead of hanging. Raises UserError where there are more processes than devices.
    """
    local_rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (device.index is not None or device.type == "mps"):
        raise UserError(
            f"{device} is one device, and there are {world} processes: each takes its own with cuda, or cpu"
        )
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices: "
                "--nproc-per-node is at most their number"
            )
        torch.cuda.set_device(device)
        require_served(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def require_served(name: str, capability: tuple[int, int]) -> None:
    """Raises UserError, with what to install, where this build of PyTorch has no code for a GPU of that capability.

    Code for one architecture runs on later ones of the same major number; intermediate code (`compute_…`) on all later.
    """
    major, minor = capability
    for architecture in torch.cuda.get_arch_list():
        kind, _, digits = architecture.partition("_")
        number = int("".join(filter(str.isdigit, digits)))
        if number <= 10 * major + minor and (kind == "compute" or number // 10 == major):
            return
    raise UserError(
        f"{name} (compute capability {major}.{minor}): this build of PyTorch ({torch.__version__}) has no code for it; "
        'install one that has: pip install "torch<2.15" torchvision --index-url https://download.pytorch.org/whl/cu126'
    )


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _AllMean(torch.autograd.Function):
    """Mean over ranks. Each rank's loss depends on every rank's input, so the gradient is the mean of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return mean_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_mean(grads[0])


def all_mean(value: Tensor) -> Tensor:
    """Differentiable mean of a tensor over ranks (same shape on every rank)."""
    return cast(Tensor, _AllMean.apply(value)) if is_distributed() else value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradient."""
    return sum_over_ranks(value) / world_size() if is_distributed() else value


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over ranks, without gradient."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def summed(value: Tensor) -> Tensor:
    """The tensor, in place the sum over ranks, without gradient."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when `flag` is true on any."""
    if not is_distributed():
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value` (any small picklable object), in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` (any small picklable object) on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def waited_in_vain(error: BaseException) -> bool:
    """Whether a collective ended because another rank did not come to it in time."""
    return is_distributed() and "Timed out waiting" in str(error)


def silent_ranks(seconds: float = 5.0) -> list[int]:
    """The ranks that do not say within some seconds that they have waited in vain, too. Every rank that has may ask.

    They say so in the store of the process group. Where it is silent itself, that is rank 0: it has it.
    """
    store, silent = dist.distributed_c10d._get_default_store(), [0]

    def ask() -> None:
        store.set(f"waited/{rank()}", "")
        time.sleep(seconds)
        silent[:] = [other for other in range(world_size()) if not store.check([f"waited/{other}"])]

    asking = threading.Thread(target=ask, daemon=True)  # a store that is silent never answers
    asking.start()
    asking.join(2 * seconds)
    return silent


@torch.no_grad()
def to_all_ranks(tensors: Iterable[Tensor]) -> None:
    """Gives rank 0's numbers to the tensors of every rank, in place, where there are several."""
    if not is_distributed():
        return
    for tensor in tensors:
        numbers = tensor.detach().contiguous()
        dist.broadcast(numbers, src=0)
        tensor.copy_(numbers)


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        dist.barrier()


def check_same_state(module: nn.Module) -> None:
    """Raises UserError when ranks hold different parameters or buffers, naming the first that differs."""
    check_same(module.state_dict(), next(module.parameters()).device)


def check_same(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Raises UserError on every rank when ranks hold different tensors, naming the first that differs.

    Sums are compared, on the ranks' own `device`.
    """
    if not is_distributed():
        return
    sums = torch.stack([tensor.detach().double().sum().to(device) for tensor in tensors.values()])
    sums = sums.nan_to_num(torch.inf)  # the smallest of a number and nan is either
    if len(set(gather_objects(len(sums)))) > 1:
        raise UserError("ranks hold different states: do all machines see the same run folder, code and config?")
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    same = low == high
    if not bool(same.all()):
        first = list(tensors)[int((~same).nonzero()[0])]
        raise UserError(f"ranks hold different weights, first at '{first}': restart from the last checkpoint")
