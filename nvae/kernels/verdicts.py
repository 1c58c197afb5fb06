"""What was found of fast computations on this machine, kept beside the compiled files.

A verdict holds for a device's model, a type of tensors, the versions of PyTorch and Triton, and the sources of the
rooms that compute. Where nothing can be kept, each process finds out anew.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..core.errors import in_a_line
from ..core.files import atomic_file
from .machine import cache_folder, processor

SOUND = "sound"

_found: dict[str, str] = {}


def verdict(name: str, device: torch.device, dtype: torch.dtype, judge: Callable[[], str]) -> str:
    """`SOUND`, or what is wrong with the computation `name`: as kept, or as `judge` finds now.

    What is left out is named in one line, once a process. An error of `judge` is one of this process alone: a full disk
    or a compiler that was killed says nothing of the next.
    """
    key = f"{name} on {_model_of(device)} in {str(dtype).removeprefix('torch.')}"
    if key not in _found:
        kept = _kept()
        if key in kept:
            _found[key] = kept[key]
        else:
            try:
                _found[key] = judge()
                _keep(key, _found[key])
            except Exception as error:
                _found[key] = in_a_line(error)
        if _found[key] != SOUND:
            warnings.warn(f"{key} is left out: {_found[key]}", stacklevel=2)
    return _found[key]


def forget() -> None:
    """Forgets what this process has found; what is kept on disk stays."""
    _found.clear()


def _kept() -> dict[str, str]:
    path = _path()
    with suppress(OSError, ValueError):
        if path is not None:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}
    return {}


def _keep(key: str, found: str) -> None:
    """Adds a verdict. Of two processes that add at once one may win: the other's is found again."""
    path = _path()
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(_kept() | {key: found}, indent=1).encode())


def _path() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"verdicts-{_versions()}.json"


@cache
def _versions() -> str:
    """Sixteen digits of everything that a verdict depends on besides device and type."""
    digest = hashlib.sha256(torch.__version__.encode())
    with suppress(PackageNotFoundError):
        digest.update(version("triton").encode())
    package = Path(__file__).parents[1]
    for room in ("kernels", "bricks"):
        for file in sorted((package / room).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _model_of(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return (
        f"{device.type} {hashlib.sha256(processor().encode()).hexdigest()[:8]}" if device.type == "cpu" else device.type
    )
