"""Updates of a run on a GPU that is not there, alone or as one of many ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from fake_gpu import GPU, Script, Trace, fake_gpu
from gpu_code import Launched, gpu_code
from torch.testing._internal.distributed.fake_pg import FakeStore

from nvae.bricks.regularizers import SpectralPenalty
from nvae.core.precision import Precision
from nvae.data.loading import Batch
from nvae.kernels.fusion import compile_each
from nvae.training import setup, trainer
from nvae.training.config import AnyRunConfig
from nvae.training.optim import Schedule
from nvae.training.trainer import Trainer

TOTAL_STEPS = 1000
STEP = 100
"""The update that is traced: in the KL's warm-up, without a line of numbers."""


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Within, this process is the first of so many, whose collectives do nothing."""
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()


def traced_update(config: AnyRunConfig, precision: Precision, *, world: int = 1, accumulation: int = 1) -> Trace:
    """What an update of a run asks of its GPU, as one of `world` ranks, once the optimiser has its memory.

    Without DDP, whose exchange of gradients is PyTorch's own; and without loading images.
    """
    with pytest.MonkeyPatch.context() as patch, ranks(world), fake_gpu(patch):
        run = _under_way(patch, config, precision, accumulation)
        trace = Trace(patch)
        with trace:
            run.step()
    return trace


def compiled_update(config: AnyRunConfig, precision: Precision) -> tuple[Trace, Launched]:
    """What an update of a run with `train.compile` asks of its GPU: outside of the compiled parts, and within them."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch), gpu_code(patch) as launched:
        run = _under_way(patch, config, precision, 1)
        launched.trace = Trace(patch)
        compile_each(run.model.parts())
        with launched.trace:
            run.step()
    return launched.trace, launched


def traced_gradients(config: AnyRunConfig, precision: Precision, *steps: int) -> tuple[Trace, list[Script]]:
    """What the part of an update that `train.graph` records asks of a GPU, at each of some steps of a run."""
    scripts = [Script() for _ in steps]
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch):
        run = _trainer(config, precision, 1)
        trace = Trace(patch)
        for step, script in zip(steps, scripts, strict=True):
            run.state.step = step
            with trace:
                passes = [run._next_pass()]
                with script:
                    run._gradients(passes)
    return trace, scripts


@dataclass(frozen=True)
class Readiness:
    """When a rank's gradients are complete in its backward pass."""

    gradients: list[tuple[float, int]]
    """Seconds that the pass has taken by then, and how many numbers there are of a parameter."""
    seconds: float
    """In all."""

    def after(self, share: float) -> float:
        """The share of all numbers that is complete after a share of the pass's time."""
        ready = sum(numbers for seconds, numbers in self.gradients if seconds <= share * self.seconds)
        return ready / sum(numbers for _, numbers in self.gradients)


def readiness(config: AnyRunConfig, *, world: int) -> Readiness:
    """That of a run in fp16, of the first of its ranks, on GPUs that reach their peaks."""
    with pytest.MonkeyPatch.context() as patch, ranks(world), fake_gpu(patch):
        patch.setattr(trainer, "parallel", lambda model, device, exchange: model)
        run = _trainer(config, "fp16", 1)
        trace = Trace(patch)
        found: list[tuple[float, int]] = []
        for parameter in run.parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: found.append((trace.seconds, p.numel())))
        with trace:
            loss, _ = run._loss(run.parallel, run._next_pass())
            start = trace.seconds
            loss.backward()
    return Readiness([(seconds - start, numbers) for seconds, numbers in found], trace.seconds - start)


def _under_way(patch: pytest.MonkeyPatch, config: AnyRunConfig, precision: Precision, accumulation: int) -> Trainer:
    """One whose optimiser has its memory."""
    patch.setattr(trainer, "parallel", lambda model, device, exchange: model)
    run = _trainer(config, precision, accumulation)
    for parameter in run.parameters:
        parameter.grad = torch.empty_like(parameter)
    run.state.optimiser.step()
    return run


def _trainer(config: AnyRunConfig, precision: Precision, accumulation: int) -> Trainer:
    with GPU:
        state = setup._state(config, GPU, precision)
    for module in state.model.modules():
        if isinstance(module, SpectralPenalty):
            module._started = True
    model, data = config.model, config.data
    images = torch.zeros(data.batch, model.image_channels, model.image_size, model.image_size, device=GPU)
    labels = torch.zeros(data.batch, dtype=torch.int64, device=GPU)
    unused = cast(Any, SimpleNamespace(path=Path("nowhere")))
    run = Trainer(
        state,
        cast(Any, SimpleNamespace(config=data, seed=0, epoch_size=50_000)),
        Schedule(config.optim, TOTAL_STEPS, 10.0, data.batch),
        config.train.model_copy(update={"log_every": TOTAL_STEPS}),
        unused,
        unused,
        unused,
        cast(Any, SimpleNamespace(requested=False)),
        accumulation=accumulation,
        precision=precision,
        resolved_config={},
    )
    run.model.train()
    run.state.step = STEP
    run.batches = cast(Any, iter(lambda: Batch(images, list(range(data.batch)), labels), None))
    return run
