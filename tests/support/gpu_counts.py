"""What code for a GPU that is not there would launch. For processes of their own: the library remembers the GPU."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from fake_gpu import Trace, let_it_train
from fake_update import compiled_update, traced_update
from gpu_code import gpu_code
from places import ROOT

from nvae.kernels.fusion import ON_GPUS
from nvae.training.config import AnyRunConfig, read_run_config

R = TypeVar("R")


def alone(function: Callable[..., R], *args: Any) -> R:
    """A function's result, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def kernels_of_passes(folder: Path, world: int, *overrides: str) -> dict[str, int]:
    """Of each pass over memory in an update of CIFAR-10's recipe, as made for its first call, the largest images."""
    let_it_train(folder)
    made: dict[str, int] = {}
    run = Trace._passed
    with pytest.MonkeyPatch.context() as patch, gpu_code(patch) as launched:

        def compiled_once(trace: Trace, function: Any, args: tuple[Any, ...]) -> Any:
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            if not (trace._silent or name in made):
                launched.trace = trace
                before = launched.kernels.total()
                torch.compile(function, fullgraph=True, dynamic=False, options=ON_GPUS)(*args)
                made[name] = launched.kernels.total() - before
            return run(trace, function, args)

        patch.setattr(Trace, "_passed", compiled_once)
        traced_update(_cifar10(*overrides), "fp16", world=world)
    return made


def launches_compiled(folder: Path, *overrides: str) -> int:
    """Of an update of CIFAR-10's recipe with `train.compile`."""
    let_it_train(folder)
    trace, launched = compiled_update(_cifar10(*overrides), "fp16")
    return trace.launches.total() + launched.kernels.total()


def _cifar10(*overrides: str) -> AnyRunConfig:
    return read_run_config(ROOT / "configs" / "cifar10.yaml", list(overrides))
