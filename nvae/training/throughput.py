"""How fast a run is and what it takes of its device: speed against what the maker names, memory."""

import time
import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..core.distributed import world_size
from ..core.errors import in_a_line
from ..core.memory import MIB, peak_mib
from ..core.precision import Precision
from ..kernels.operations import using
from ..models.base import Family
from ..models.config import ModelConfig
from ..models.registry import build

PEAKS: dict[str, dict[str, float]] = {
    "V100": {"fp32": 15.7, "fp16": 125},
    "V100 PCIE": {"fp32": 14, "fp16": 112},
    "T4": {"fp32": 8.1, "fp16": 65},
    "A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "L4": {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 990, "fp16": 990},
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756},
    "H100 NVL": {"fp32": 60, "tf32": 418, "bf16": 835, "fp16": 835},
    "H200": {"fp32": 67, "tf32": 495, "bf16": 990, "fp16": 990},
    "H200 NVL": {"fp32": 60, "tf32": 418, "bf16": 835, "fp16": 835},
}
"""TFLOP/s of dense products by precision, from NVIDIA's data sheet of each GPU; half of what is named with sparsity.

A plain name is the SXM form. Of two names that fit, the longer one counts."""


def peak_tflops(name: str, precision: Precision) -> float | None:
    """What a GPU of that name does at most in a precision; None where the table does not know."""
    words = name.replace("-", " ").split()
    known = [model for model in PEAKS if all(word in words for word in model.split())]
    return PEAKS[max(known, key=len)].get(precision) if known else None


def training_flop(model: Family[Any], images: Tensor) -> float:
    """Operations of the products of a training step on images, from their shapes as the model computes them plainly.

    A product and a sum are two; input and weight gradients take as many as the forward pass. What recomputation repeats
    is not counted. Call it where gradients are taken: the counter cannot do without.
    """
    with using("plain"), FlopCounterMode(display=False) as counter:
        model(images)
    return float(3 * counter.get_total_flops())


def flop_per_image(config: ModelConfig) -> float:
    """The same for one image, counted on tensors that have shapes and no numbers. Other ranks are asked nothing."""
    with FakeTensorMode():
        model = build(config).eval()  # no statistics of a batch, which would span the ranks
        model.training = True  # no look at the images, which have no numbers
        return training_flop(model, torch.zeros(1, config.image_channels, config.image_size, config.image_size))


class Meter:
    """Speed and memory of a run since its clock was started, one reading a line of numbers."""

    def __init__(self, config: ModelConfig, device: torch.device, precision: Precision) -> None:
        self.config, self.device = config, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_tflops = peak_tflops(name, precision)
        self.start(0)

    def start(self, images: int) -> None:
        """Starts the clock, at so many images seen by all ranks."""
        self._since = (time.perf_counter(), images)

    def read(self, images: int) -> dict[str, float]:
        """What this process needed since the clock was started, which starts again.

        On CUDA with `reserved_memory_mib`, most that PyTorch has kept of the device; where its peak is known, with
        `tflops` of each device and their `share_of_peak`.
        """
        then, images_then = self._since
        rate = (images - images_then) / (time.perf_counter() - then)
        numbers = {"images_per_second": rate, "peak_memory_mib": peak_mib(self.device)}
        if self.device.type == "cuda":
            numbers["reserved_memory_mib"] = torch.cuda.max_memory_reserved(self.device) / MIB
        if self.peak_tflops is not None and self._flop is not None:
            tflops = rate / world_size() * self._flop / 1e12
            numbers |= {"tflops": tflops, "share_of_peak": tflops / self.peak_tflops}
        self.start(images)
        return numbers

    @cached_property
    def _flop(self) -> float | None:
        """Of an image; None, and a line says so, for a model that cannot be counted."""
        try:
            return flop_per_image(self.config)
        except Exception as error:  # of a family of somebody's own
            warnings.warn(f"no TFLOP/s in the log: {in_a_line(error)}", stacklevel=2)
            return None
