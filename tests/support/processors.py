"""The vectors that this processor has, for tests of what is ours in C++."""

import platform
from types import ModuleType

import pytest
import torch

from nvae.kernels import native
from nvae.kernels.cpu import bottleneck

PROCESSORS = ["native"]
"""What to compile for: vectors of 16, 4 and 8 numbers."""
if platform.machine() == "x86_64":
    PROCESSORS += ["x86-64"] + ["haswell"] * (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))

needs_compiler = pytest.mark.skipif(native.library(bottleneck.SOURCE) is None, reason="no C++ compiler")


def compile_for(processor: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a module of nvae/kernels/cpu use its library as compiled for one of `PROCESSORS`."""
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("native", processor) for flag in native.FLAGS))
    made = native.library.__wrapped__(module.SOURCE)
    assert made is not None
    monkeypatch.setattr(module, "made_from", lambda source: made)
