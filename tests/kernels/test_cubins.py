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
    "_forward": {"has_bias": False, "turned": False, "block_runs": 4, "block_channels": 64},
    "_input_gradient": {"block_columns": 16, "block_channels": 64},
    "_weight_gradient": {"rows_per_program": 4, "block_taps": 32, "block_channels": 64},
}
JUMP = re.compile(r"BRA `\((\.L\w+)\)")
UNROLLED = 4
"""Positions that a pass through the loop of the weight gradient sums."""
REGISTERS = {"_forward": 168, "_input_gradient": 128, "_weight_gradient": 128}
"""Of a thread, at most: 16 warps share a multiprocessor's 65536 then; of the first, which has 32 sums in each, 12."""

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
        if argument in ("partial_pointer", "taps_pointer"):
            return "*fp64" if dtype == "fp64" else "*fp32"
        return f"*{dtype}" if argument.endswith("_pointer") else "i32"

    source = ASTSource(
        kernel,
        {argument: kind(argument) for argument in names},
        {(names.index(argument),): value for argument, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_pointer")},
    )
    options = {"num_warps": depthwise.warps(constants["block_runs"]) if "block_runs" in constants else 4}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def told(made: Any, folder: Path, tool: str, option: str) -> str:
    """What one of NVIDIA's tools says of a kernel's machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    return subprocess.run([TOOLS / tool, option, file], capture_output=True, text=True, check=True).stdout


def usage(made: Any, folder: Path) -> dict[str, int]:
    """Registers and bytes of local memory of a thread, and bytes of shared memory of a program."""
    said = told(made, folder, "cuobjdump", "-res-usage")
    return {name: int(number) for name, number in re.findall(r"(REG|LOCAL|SHARED):(\d+)", said)}


def disassembled(made: Any, folder: Path) -> list[str]:
    """Its instructions and labels, in their order in memory."""
    said = told(made, folder, "nvdisasm", "-c")
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in said.splitlines()]
    return [line for line in lines if line.endswith((";", ":"))]


def longest_loop(code: list[str]) -> int:
    """Instructions of the longest loop without a loop in it."""
    places = {line[:-1]: place for place, line in enumerate(code) if line.endswith(":")}
    jumps = [(places.get(found[1], place), place) for place, line in enumerate(code) if (found := JUMP.search(line))]
    loops = [(start, end) for start, end in jumps if start < end - 1]
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    return max(end - start for start, end in inner)


def machines() -> list[Any]:
    """Every GPU with every type; in slow tests what few train with."""

    def few(kind: int, dtype: str) -> bool:
        return dtype == "fp64" or (dtype != "fp16" and kind in (GPUS["T4"], GPUS["B200"]))

    return [
        pytest.param(kind, dtype, marks=pytest.mark.slow if few(kind, dtype) else (), id=f"{gpu}-{dtype}")
        for gpu, kind in GPUS.items()
        for dtype in TYPES
    ]


@pytest.mark.parametrize(("capability", "dtype"), machines())
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_code_of_every_gpu_that_stays_in_registers(
    name: str, capability: int, dtype: str, tmp_path: Path
) -> None:
    used = usage(compiled(name, dtype, capability), tmp_path)
    assert used["LOCAL"] == 0
    assert used["REG"] <= (255 if dtype == "fp64" else REGISTERS[name])


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


def test_an_output_at_5x5_takes_few_instructions(tmp_path: Path) -> None:
    """Of the 60, 25 are its products; of the 130, too. They took 142 and 332."""
    columns, channels = 16, 64
    code = disassembled(compiled("_forward", "fp16", GPUS["A100"]), tmp_path)
    assert sum(line.endswith(";") for line in code) * 32 <= 60 * columns * channels
    code = disassembled(compiled("_weight_gradient", "fp16", GPUS["A100"]), tmp_path)
    assert longest_loop(code) / UNROLLED * 128 <= 130 * channels
