"""A CUDA device that is not there: its tensors have shapes, types and strides but no numbers, and can be trained.

`let_it_train` prepares the process, `fake_gpu` is where such tensors live, and `Trace` writes down what a real device
would be asked to do.
"""

import ctypes
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.flop_counter import flop_registry

from nvae.kernels import fusion, operations

GPU = torch.device("cuda", 0)
SHIM = Path(__file__).with_name("no_context.cpp")
PEAK, BANDWIDTH = 312e12, 2.039e12
"""An A100's FLOP/s and bytes/s, by its data sheet."""
TENSORS_A_LAUNCH = 50
"""Of an operator on lists of tensors."""
PASSES = {
    "batch_norm._measured": 3,
    "batch_norm._shares": 3,
    "batch_norm._gradient_sums": 3,
    "batch_norm.coefficients": 2,
    "gated_sum._means_of_y": 2,
    "gated_sum._gate_gradient": 2,
    "latents._bounded": 2,
    "latents._scored": 4,
}
"""Kernels of the compiled passes that are not one, at most (tests/kernels/test_gpu_code.py)."""
OPERATORS = {"depthwise": 2, "depthwise_input_gradient": 2, "depthwise_weight_gradient": 2}
"""Kernels of our operators that are not one: kernels turned beforehand, partial sums added up afterwards."""
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")
"""Operators whose result the host waits for."""
COPIES = ("_to_copy", "copy_")
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "resize_",
    "_unsafe_view",
    "is_pinned",
)
"""Operators that launch nothing, besides views."""


def let_it_train(folder: Path) -> None:
    """Lets this process take gradients without a GPU; skips the test where it can't be had.

    `folder` is one that a library may be compiled in.
    """
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built without CUDA")
    if torch.cuda.is_available():
        pytest.skip("a real GPU is there")
    library = folder / "no_context.so"
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(SHIM), *paths, "-ltorch_cpu", "-lc10", "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{SHIM.name} could not be compiled: {error}")
    torch.zeros(1)
    ctypes.CDLL(str(library)).answer_no()


@contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, tensors on `GPU` can be made and trained, with autocast."""
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    patch.setattr("nvae.core.randomness.generator", lambda *key: None)
    patch.setattr(torch.nn.Module, "to", lambda module, *place: module)  # it is made where it shall be
    here = torch.autograd.set_multithreading_enabled(False)  # a device that is not there has no thread for gradients
    with operations.using("auto"), here, FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Trace(TorchDispatchMode):
    """Within, counts what a GPU is asked to do, and notes where the host waits for it.

    A pass of nvae/kernels/fusion.py counts as what it is compiled to: it reads its arguments and writes its results.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        """Kernels, by operator."""
        self.moved: Counter[str] = Counter()
        """Bytes read and written, by operator."""
        self.seconds = 0.0
        """The least that an A100 needs: for each operator its memory's or its products' in fp16."""
        self.waits: Counter[str] = Counter()
        """What the host waits for: reads of the device, and copies from or to memory that is not pinned."""
        self.mixed: Counter[str] = Counter()
        """Operators on tensors of two devices."""
        self._silent = False
        self._pinned: list[Tensor] = []
        patch.setattr(fusion, "_worth_compiling", _worth_compiling)
        patch.setattr(fusion._Kernels, "are_sound", lambda kernels, args: True)
        patch.setattr(fusion._Kernels, "made", lambda kernels, *args: self._passed(kernels.function, args))
        patch.setattr(fusion._Kernels, "of", lambda kernels, x: lambda *args: self._passed(kernels.function, args))

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes nothing, so that the compiler may trace within."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        given = _tensors((args, kwargs or {}))
        if name in READS and given[0].is_cuda:
            self.waits[f"{name} at {_asked_at()}"] += 1
            if name == "_local_scalar_dense":
                return 0.0 if given[0].is_floating_point() else 0
        if name == "_pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        made = func(*args, **(kwargs or {}))
        results = _tensors(made)
        if not (self._silent or func.is_view or name in FREE or func.namespace in ("prim", "profiler")):
            if len({tensor.device.type for tensor in given + results if tensor.dim() or name in COPIES}) > 1:
                self._between_devices(name, args, kwargs or {}, results)
            if any(tensor.is_cuda for tensor in given + results):
                written = [args[0]] if func._schema.is_mutable and isinstance(args[0], Tensor) else results
                self._count(name, _launches(name, args), given + written, _products(func, args, kwargs or {}, made))
        return made

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, nothing is counted."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def _passed(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A fused function's result."""
        counts = not self._silent
        with self.silent():
            made = function(*args)
        if counts:
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            self._count(name, PASSES.get(name, 1), _tensors((args, made)))
        return made

    def _count(self, name: str, launches: int, tensors: Iterable[Tensor], products: int = 0) -> None:
        moved = sum(map(_size, tensors))
        self.launches[name] += launches
        self.moved[name] += moved
        self.seconds += max(moved / BANDWIDTH, products / PEAK)

    def _between_devices(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        if name not in COPIES:
            self.mixed[f"{name} at {_asked_at()}"] += 1
            return
        source = args[1] if name == "copy_" else args[0]
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not (asynchronous and any(source is tensor for tensor in self._pinned)):
            self.waits[f"copy from {source.device.type} at {_asked_at()}"] += 1


class Script(TorchDispatchMode):
    """Within, writes down what is asked of a GPU, word for word: operators and what they are given, but for numbers
    in tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.between_devices: list[str] = []
        """Copies, which a replay would make from memory that holds something else by then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = _tensors((args, kwargs or {}, made))
        if any(tensor.is_cuda for tensor in tensors) and func.namespace != "prim":
            told = tree_map_only(Tensor, _told, (args, kwargs or {}))
            self.lines.append(f"{func} {told}")
            if func._schema.name.partition("::")[2] in COPIES and not all(tensor.is_cuda for tensor in tensors):
                self.between_devices.append(f"{self.lines[-1]} at {_asked_at()}")
        return made


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} on {tensor.device.type}"


def _worth_compiling(x: Tensor, least: int | None, few: bool) -> bool:
    return not operations.is_plain() and fusion._are_enough(x, least, few)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _launches(name: str, args: Any) -> int:
    """Kernels of an operator: one, or for lists of tensors as many as it takes."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    listed = name.startswith(("_foreach", "_fused", "_amp_foreach")) and lists
    return -(-len(lists[0]) // TENSORS_A_LAUNCH) if listed else OPERATORS.get(name, 1)


def _products(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    """FLOP of PyTorch's convolutions and matrix products; those of others are few."""
    counted = flop_registry.get(func._overloadpacket)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=made))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; what is repeated is read once."""
    numbers = 1
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= side if stride else 1
    return numbers * tensor.element_size()


def _asked_at() -> str:
    """The line of the package that is being run, `file:function`."""
    package = str(ROOT / "nvae") + "/"
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
    return f"{ours[-1].filename.removeprefix(package)}:{ours[-1].name}" if ours else "autograd"
