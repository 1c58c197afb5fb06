"""What is installed, and which devices it serves."""

import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from ..core.distributed import require_served
from ..core.errors import UserError, in_a_line
from ..core.precision import AUTOCAST, Precision, allow_tf32, precision_on
from ..kernels.compilers import compiles
from .findings import Finding

PACKAGES = ("torchvision", "triton", "numpy", "nvae")
GIB = 2**30
SMI_SECONDS = 20


def versions() -> Iterator[Finding]:
    """Python, PyTorch with what it was built with, and the packages that matter to it."""
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    cuda = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else None)
    built = (
        f"built for CUDA {cuda}" if torch.version.cuda else "built for CPUs" if cuda is None else f"built for {cuda}"
    )
    yield Finding("torch", f"{torch.__version__}, {built}", figures={"version": torch.__version__, "cuda": cuda})
    if torch.version.cuda:
        yield Finding("cuDNN", str(torch.backends.cudnn.version()))  # type: ignore[no-untyped-call]
        yield Finding("NCCL", _nccl())
        yield Finding("architectures", " ".join(torch.cuda.get_arch_list()) or "not known without a driver")
    for package in PACKAGES:
        yield Finding(package, _version(package))
    yield _importable("torchvision")
    yield Finding(
        "apex", "has FusedAdam" if _has_fused_adam() else "not installed, needed by optim.name=fused_adam only"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nccl() -> str:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (AttributeError, RuntimeError) as error:
        return f"not known ({in_a_line(error)})"


def _importable(package: str) -> Finding:
    """torchvision of another build than torch's is found out by importing it."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return Finding(package, f"cannot be imported: {in_a_line(error)}", attention=True)
    return Finding(package, "can be imported")


def _has_fused_adam() -> bool:
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except Exception:
        return False


def devices() -> Iterator[Finding]:
    """The CPU, every GPU, whether PyTorch serves it, and the driver."""
    yield Finding("cores", f"{cores()} for this process", figures={"cores": cores()})
    names = _gpus_of_the_driver()
    if names and not torch.cuda.is_available():
        why = "this build of PyTorch is for CPUs" if torch.version.cuda is None else "PyTorch cannot use it"
        yield Finding("GPU", f"{names[0]} is here, but {why}; see README, Installing by hand", attention=True)
    if not torch.cuda.is_available():
        yield Finding("CUDA", "no device: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)
    ready = compiles("cuda")
    yield Finding("fused kernels", "Triton makes them" if ready else "Triton is missing: slower", attention=not ready)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus_of_the_driver() -> list[str]:
    """Name and driver of each GPU, as NVIDIA's own program lists them; none where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [re.sub(r",\s*", ", driver ", line.strip()) for line in told.splitlines() if line.strip()]


def _gpu(index: int) -> Iterator[Finding]:
    """Name, capability, memory and precisions of a GPU; the line to install by where PyTorch has no code for it."""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    try:
        require_served(name, capability)
    except UserError as error:
        yield Finding(f"cuda:{index}", str(error), attention=True)
        return
    free, total = torch.cuda.mem_get_info(index)
    words = (
        f"{name}, compute capability {capability[0]}.{capability[1]}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    )
    figures = {"name": name, "capability": list(capability), "free_bytes": free, "total_bytes": total}
    yield Finding(f"cuda:{index}", words, attention=free < total / 2, figures=figures)


def precisions(device: torch.device) -> Iterator[Finding]:
    """Which precisions a device has: of each a small product is computed."""
    wanted: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
    for precision in wanted:
        try:
            allow_tf32(precision_on(device, precision, precision))
        except UserError as error:
            yield Finding(precision, str(error).partition(": ")[2], figures={"supported": False})
            continue
        a = torch.full((64, 64), 0.5, device=device, dtype=AUTOCAST.get(precision, torch.float32))
        right = bool(((a @ a).float() == 16).all())
        words = "yes" if right else "a product of matrices comes out wrong"
        yield Finding(precision, words, attention=not right, figures={"supported": right})
    allow_tf32("fp32")
    mixed = precision_on(device, "mixed", "mixed")
    yield Finding("mixed", f"means {mixed} here", figures={"means": mixed})
