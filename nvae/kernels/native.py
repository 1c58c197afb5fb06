"""C++ of our own, compiled at first use for the processor it runs on, and kept on disk.

A library is a file of C functions without dependencies but the headers beside it, called through ctypes. Its name is a
hash of the source, those headers, the flags, the compiler and the processor, so that machines which share a home
directory never run each other's code.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..core.files import atomic_file
from .compilers import compiles
from .machine import cache_folder, processor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ file; None, after one warning, where it can't be had."""
    if sys.platform != "linux" or not compiles("cpu"):
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
        texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
        parts = (*texts, *FLAGS, _version(compiler), processor())
        name = f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
        return _kept(name) or _compiled(compiler, source, name)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(f"evaluation and sampling are slower without {source.name}: {detail}", stacklevel=2)
        return None


def made_from(source: Path) -> ctypes.CDLL:
    """The library of a C++ file, where it is known that there is one."""
    made = library(source)
    assert made is not None
    return made


def structure(name: str, integers: str, floats: str, pointers: str) -> type[ctypes.Structure]:
    """The type of a C++ struct of int64_t, then float, then pointers; each list of names is separated by spaces."""
    kinds = ((integers, ctypes.c_int64), (floats, ctypes.c_float), (pointers, ctypes.c_void_p))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) with its numbers in the order (B, H, W, C), which our C++ reads."""
    return x.contiguous(memory_format=torch.channels_last)


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Data pointers of tensors, None where absent."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _kept(name: str) -> ctypes.CDLL | None:
    """A library made before, by this user; None where there is none that loads."""
    folder = cache_folder()
    with suppress(OSError):
        if folder is not None and (folder / name).stat().st_uid == os.getuid():
            return ctypes.CDLL(str(folder / name))
    return None


def _compiled(compiler: str, source: Path, name: str) -> ctypes.CDLL:
    """Several processes may do this at once: each keeps a whole file. Where none can be kept, it is made every time."""
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        if (folder := cache_folder()) is not None:
            with suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with atomic_file(folder / name) as file:
                    file.write(made.read_bytes())
        return _kept(name) or ctypes.CDLL(str(made))


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
