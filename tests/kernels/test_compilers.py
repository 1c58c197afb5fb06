"""What PyTorch's compilers are asked, and what they say to users."""

import logging

import pytest
import torch
from processors import needs_compiler

from nvae.kernels import compilers
from nvae.kernels.cpu.bottleneck import available

TALKER = logging.getLogger("torch.utils.cpp_extension")
TALK = "No CUDA runtime is found, using CUDA_HOME='%s'"


def test_the_mark_of_a_constant_is_pytorchs() -> None:
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked).items() <= vars(available).items()


def test_pytorch_still_says_where_cudas_tools_are_in_those_words() -> None:
    from torch.utils import cpp_extension

    assert cpp_extension.__name__ == TALKER.name
    constants = cpp_extension._find_cuda_home.__code__.co_consts
    assert any(str(constant).startswith(TALK.partition(",")[0]) for constant in constants)


@needs_compiler
def test_nobody_reads_where_cudas_tools_are(caplog: pytest.LogCaptureFixture) -> None:
    compilers.compiles.cache_clear()
    assert compilers.compiles("cpu")
    TALKER.warning(TALK, "/usr/local")
    TALKER.warning("something else")
    assert caplog.messages == ["something else"]
