"""Devices by name, as configs and commands take them, and how tensors get there."""

import re

import torch
from torch import Tensor

from .errors import UserError

NAMED = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?|mps")


def device_name(text: str) -> str:
    """The name of a device as it was given. Raises ValueError for a word that is none."""
    if not NAMED.fullmatch(text):
        raise ValueError(f"takes auto, cpu, cuda, cuda:N or mps, found '{text}'")
    return text


def device_of(name: str, field: str) -> torch.device:
    """The device of a name; `auto` is CUDA where there is one, else the CPU; `cuda` leaves it to the rank which one.

    Raises UserError, naming the field, where this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not count:
        raise UserError(f"{field}: {name} was asked for, but no CUDA device is there")
    if number and int(number) >= count:
        raise UserError(f"{field}: {name} was asked for, but this machine has cuda:0 to cuda:{count - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{field}: mps was asked for, but PyTorch finds no Apple GPU here")
    return torch.device(name)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU's on a device. A GPU copies it when its turn comes; nobody waits for that."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
