"""C++ of our own, compiled at first use for the processor it runs on, and kept on disk.

A library is a file of C functions without dependencies, called through ctypes. Its name is a hash of the source, the
flags, the compiler and the processor, so that machines which share a home directory never run each other's code.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

from .checkpoint import atomic_file
from .fusion import compiles

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ file; None, after one warning, where it can't be had."""
    if sys.platform != "linux" or not compiles("cpu"):
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    compiler = get_cpp_compiler()
    parts = (source.read_text(encoding="utf-8"), *FLAGS, _version(compiler), _processor())
    file = cache_folder() / f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(file)) if file.exists() else _compiled(compiler, source, file)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(f"{source.name} is not used, evaluation and sampling are slower: {detail}", stacklevel=2)
        return None


def cache_folder() -> Path:
    """Where libraries are kept: nvae/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvae"


def _compiled(compiler: str, source: Path, keep_as: Path) -> ctypes.CDLL:
    """Several processes may do this at once: each keeps a whole file. Where none can be kept, it is made every time."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / keep_as.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        loaded = ctypes.CDLL(str(made))
        with suppress(OSError), atomic_file(keep_as) as file:
            file.write(made.read_bytes())
    return loaded


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def _processor() -> str:
    """What the processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *dict.fromkeys(features)])
