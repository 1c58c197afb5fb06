"""The code that PyTorch's compiler makes for a CUDA device that is not there: how many kernels it would launch.

Within `gpu_code`, `torch.compile` writes its code for an H100, counts what that launches, and runs the operators it was
made of on tensors without numbers. Nothing is compiled further: no Triton, no C++.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import OPERATORS, Trace

KERNEL = re.compile(r"(triton_\w+)\.run\(")
LIBRARY = re.compile(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(")
H100: dict[str, Any] = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "total_memory": 80 * 2**30,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 * 2**20,
    "clock_rate": 1_980_000,
    "memory_clock_rate": 2_619_000,
    "memory_bus_width": 5120,
    "gcnArchName": "",
    "uuid": "",
    "pci_bus_id": 0,
}


class Launched:
    """What compiled code launches: kernels by name, whenever it runs."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.trace: Trace | None = None
        """Is not to count the operators that stand in for the code."""

    def uncounted(self) -> AbstractContextManager[None]:
        """Within, the trace, if there is one, counts nothing."""
        return nullcontext() if self.trace is None else self.trace.silent()


@contextmanager
def gpu_code(patch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """Within, `torch.compile` makes code for a GPU that is not there; a `Launched` counts what it launches.

    For a process of its own: what the library finds of its devices it remembers.
    """
    launched = Launched()
    _pretend(patch)
    _write_only(patch, launched)
    with torch._inductor.config.patch(fx_graph_cache=False, joint_graph_constant_folding=False):
        yield launched


def _pretend(patch: pytest.MonkeyPatch) -> None:
    """That an H100 is device 0, as far as the compiler asks."""
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.pad_mm as padding
    import torch.cuda.graphs as graphs
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    properties, state = SimpleNamespace(**H100), torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
        patch.setattr(CudaInterface, name.removeprefix("_"), staticmethod(answer))
    patch.setattr(CudaInterface, "get_raw_stream", staticmethod(lambda device=0: 0))
    patch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(answers["get_device_properties"]))
    patch.setattr(CudaInterface.Worker, "current_device", staticmethod(answers["current_device"]))
    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0))
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    patch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": state)
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": None)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(graphs, "is_current_stream_capturing", lambda: False)
    patch.setattr(attention, "_sfdp_init", lambda *args: None)  # patterns that are made with numbers on the device
    patch.setattr(padding, "_pad_mm_init", lambda *args: None)
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    patch.setattr(torch._subclasses.fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda mode: True))
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448, "max_num_regs": 65536}),
    )
    patch.setattr(triton.runtime.driver, "_active", driver, raising=False)


def _write_only(patch: pytest.MonkeyPatch, launched: Launched) -> None:
    """Code is written and counted, and what it was made of runs in its place."""
    import torch._inductor.async_compile as compiling
    import torch._inductor.runtime.triton_helpers as helpers
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    class NoKernel:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    written: list[str] = []
    inductor = compile_fx.compile_fx_inner
    patch.setattr(helpers, "set_driver_to_gpu", lambda: None)
    patch.setattr(compiling.AsyncCompile, "triton", lambda self, name, source, device_str="cuda": NoKernel())
    patch.setattr(GraphLowering, "save_output_code", staticmethod(written.append))

    def inner(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        written.clear()
        with launched.uncounted():
            inductor(copy.deepcopy(graph), inputs, **options)
        body = written[-1].partition("def call(")[2] if written else ""
        kernels = Counter(KERNEL.findall(body) + LIBRARY.findall(body))
        for name, launches in OPERATORS.items():
            kernels[f"torch.ops.nvae.{name}.default"] *= launches

        def run(*args: Any) -> Any:
            launched.kernels.update(kernels)
            with launched.uncounted():
                return graph.forward(*args)

        return make_boxed_func(run)

    @cache  # modules share their code where they share the backend
    def backend(options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        def write(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            with launched.uncounted(), torch._inductor.config.patch(dict(options)):
                return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

        return write

    from torch import compile as original

    def compiled(model: Any = None, *, options: Any = None, **settings: Any) -> Any:
        return original(model, backend=backend(tuple((options or {}).items())), **settings)

    patch.setattr(torch, "compile", compiled)
