"""The vectors that this processor has, for tests of what is ours in C++."""

import ctypes
import platform
from functools import cache
from pathlib import Path

import pytest
import torch

from nvae.bricks import bottleneck as inference
from nvae.kernels import native

PROCESSORS = ["native"]
"""What to compile for: vectors of 16, 4 and 8 numbers."""
if platform.machine() == "x86_64":
    PROCESSORS += ["x86-64"] + ["haswell"] * (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))

needs_compiler = pytest.mark.skipif(native.library(inference.SOURCE) is None, reason="no C++ compiler")
needs_float16 = pytest.mark.skipif(
    not (inference.available() and inference._made().has_float16()), reason="no float16 in this processor"
)


def library_for(processor: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library as compiled for one of `PROCESSORS`."""
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("native", processor) for flag in native.FLAGS))
    return _made(source, native.FLAGS)


@cache
def _made(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library compiled with `flags`, which `native` has at the time; looked up once, not for every test."""
    made = native.library.__wrapped__(source)
    assert made is not None
    return made
