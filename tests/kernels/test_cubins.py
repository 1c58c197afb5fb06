"""The Triton kernels as machine code of every GPU, made without one: they compile, stay in registers, and read rows of
channels several at once."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.backends.nvidia
import triton.language as tl
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvae.kernels.triton import depthwise

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
GPUS = {"V100": 70, "T4": 75, "A100": 80, "H100": 90, "B200": 100}
"""Compute capability, times ten."""
TYPES = ("fp16", "bf16", "fp32", "fp64")
FOR_ALL: dict[str, Any] = {"size": 5}
KERNELS: dict[str, dict[str, Any]] = {
    "_forward": {"has_bias": False, "block_columns": 16, "block_channels": 64},
    "_input_gradient": {"block_columns": 16, "block_channels": 64},
    "_weight_gradient": {"positions_per_program": 64, "block_taps": 32, "block_channels": 64},
}
REGISTERS = 128
"""Of a thread, at most: with 128 threads a program, four programs share a multiprocessor's 65536."""

pytestmark = [
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="Triton without NVIDIA's tools"),
    pytest.mark.skipif(Version(triton.__version__) < Version("3.3"), reason="Triton before 3.3 takes other arguments"),
]


def compiled(name: str, dtype: str, capability: int, channels: int = 768, stride: int = 1) -> Any:
    """A kernel as the launcher would have it compiled: pointers aligned to 16 bytes, sizes known at run time."""
    kernel = getattr(depthwise, name)
    accumulator = tl.float64 if dtype == "fp64" else tl.float32
    constants = FOR_ALL | KERNELS[name] | {"accumulator": accumulator, "channels": channels, "stride": stride}
    names = kernel.arg_names

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "partial_pointer":
            return "*fp64" if dtype == "fp64" else "*fp32"
        return f"*{dtype}" if argument.endswith("_pointer") else "i32"

    source = ASTSource(
        kernel,
        {argument: kind(argument) for argument in names},
        {(names.index(argument),): value for argument, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_pointer")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def usage(made: Any, folder: Path) -> dict[str, int]:
    """Registers and bytes of local memory of a thread, and bytes of shared memory of a program."""
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    said = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|LOCAL|SHARED):(\d+)", said)}


def machines() -> list[Any]:
    """Every GPU with every type; the newest and the oldest that share their code with others, mostly in slow tests."""
    rare = {GPUS["T4"], GPUS["B200"]}
    return [
        pytest.param(
            kind, dtype, marks=pytest.mark.slow if kind in rare and dtype != "fp16" else (), id=f"{gpu}-{dtype}"
        )
        for gpu, kind in GPUS.items()
        for dtype in ("fp16", "bf16", "fp32", "fp64")
    ]


@pytest.mark.parametrize(("capability", "dtype"), machines())
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_code_of_every_gpu_that_stays_in_registers(
    name: str, capability: int, dtype: str, tmp_path: Path
) -> None:
    used = usage(compiled(name, dtype, capability), tmp_path)
    assert used["LOCAL"] == 0
    assert used["REG"] <= REGISTERS


@pytest.mark.parametrize(
    ("channels", "dtype"), [(768, "fp16"), (360, "fp16"), (180, "fp16"), (120, "fp16"), (180, "fp32")]
)
@pytest.mark.parametrize("name", KERNELS)
def test_rows_of_the_recipes_channels_are_read_several_at_once(name: str, dtype: str, channels: int) -> None:
    """fp16 rows of 180 are aligned to 8 bytes only: two words at once."""
    loads = re.findall(r"ld\.global\.(?:\w+\.)*?(v[248]\.)?b(\d+)", compiled(name, dtype, 80, channels).asm["ptx"])
    assert loads and all(vector for vector, _ in loads), loads


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_compiled_for_a_stride(name: str) -> None:
    assert compiled(name, "fp16", 80, stride=2).asm["cubin"]
