"""Training: one update, the loop around it, and what it does when numbers stop being finite.

The trainer receives built objects; it knows no family, no data set and no command line.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import Config, UserError
from .data.loading import Batch, TrainingStream
from .distributed import check_same_state, is_distributed, mean_over_ranks, rank, sum_over_ranks, world_size
from .folder import RunFolder
from .models.base import Family, Metrics, Output, Recomputation
from .optim import Averaged, Schedule, SkipRule
from .randomness import derived_seed, keyed_normal
from .tracking import Tracker

Precision = Literal["fp32", "tf32", "bf16", "fp16", "mixed"]
Outcome = Literal["finished", "interrupted"]


class TrainConfig(Config):
    epochs: float = Field(100.0, gt=0)
    """Length of training in passes over the training images."""
    steps: int | None = Field(None, ge=1)
    """Length of training in updates; takes the place of `epochs`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA where there is one."""
    precision: Precision = "fp32"
    """`tf32` lets float32 products round on CUDA; `bf16`, `fp16` (loss-scaled): mixed precision; `mixed`: bf16 on a GPU
    that has it, fp16 on older ones (V100), fp32 on the CPU. Likelihood, KL and penalties stay float32."""
    loss_scale: float = Field(2.0**10, gt=0)
    """Loss scale that fp16 starts with."""
    recompute: Recomputation = "none"
    """What the backward pass computes again to save memory: nothing, batch norm and swish, or whole cells."""
    compile: bool = False
    """Compile the model's parts with torch.compile."""
    log_every: int = Field(50, ge=1)
    """Updates between two lines of numbers."""
    validate_every: float | None = Field(None, gt=0)
    """Epochs between two validations; none: only at the end."""
    validation_samples: int = Field(1, ge=1)
    """Importance samples per image in validations."""
    pictures_every: float | None = Field(None, gt=0)
    """Epochs between two sets of pictures (reconstructions, samples); none: only at the end."""
    save_every: int = Field(1000, ge=1)
    """Updates between two checkpoints."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    milestone_every: int | None = Field(None, ge=1)
    """Checkpoints whose update number is a multiple of this are kept for ever."""
    check_ranks_every: int = Field(1000, ge=1)
    """Updates between two checks that all ranks hold the same weights."""
    non_finite_limit: int = Field(10, ge=1)
    """After so many non-finite updates in a row the run goes back to its last checkpoint at half the learning rate."""
    return_limit: int = Field(3, ge=0)
    """After this many such returns the run stops."""
    init_from: str | None = None
    """A checkpoint or run folder whose weights a new run starts from."""
    timeout_minutes: float = Field(10.0, gt=0)
    """A rank that waits longer than this for the others ends the run."""


class TrainingState:
    """Everything that changes in training; one object saves and restores it all."""

    def __init__(
        self,
        model: Family[Any],
        optimiser: torch.optim.Optimizer,
        skip_rule: SkipRule,
        average: Averaged | None,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.model, self.optimiser, self.skip_rule, self.average, self.scaler = (
            model,
            optimiser,
            skip_rule,
            average,
            scaler,
        )
        self.step = 0  # updates tried so far
        self.images_seen = 0  # over all ranks
        self.skipped = 0  # updates not made because of their gradient norm
        self.non_finite = 0  # updates not made because of a non-finite number
        self.non_finite_in_a_row = 0
        self.returns = 0  # to the last good checkpoint
        self.lr_factor = 1.0
        self.best = math.inf  # lowest validation bound, nats

    counters = ("step", "images_seen", "skipped", "non_finite", "non_finite_in_a_row", "returns", "lr_factor", "best")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers; random numbers need no state, they follow from (seed, rank, step)."""
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skip_rule": self.skip_rule.state_dict(),
            "counters": {name: getattr(self, name) for name in self.counters},
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.model.mark_loaded()
        if self.average is not None:
            self.average.load_state_dict(content["ema"] or content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.scaler.load_state_dict(content["scaler"])
        self.skip_rule.load_state_dict(content["skip_rule"])
        for name, value in content["counters"].items():
            setattr(self, name, value)


class Trainer:
    """Runs a TrainingState to its last step."""

    def __init__(
        self,
        state: TrainingState,
        stream: TrainingStream,
        schedule: Schedule,
        config: TrainConfig,
        folder: RunFolder,
        tracker: Tracker,
        *,
        seed: int,
        accumulation: int,
        total_steps: int,
        resolved_config: dict[str, Any],
        validate: Callable[[Family[Any]], dict[str, float]],
        illustrate: Callable[[Family[Any]], dict[str, Tensor]],
    ) -> None:
        self.state, self.stream, self.schedule, self.config = state, stream, schedule, config
        self.folder, self.tracker = folder, tracker
        self.seed, self.accumulation, self.total_steps = seed, accumulation, total_steps
        self.resolved_config = resolved_config
        self.validate, self.illustrate = validate, illustrate
        self.model = state.model
        self.device = next(self.model.parameters()).device
        self.precision = precision_on(self.device, config.precision)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.parallel = _parallel(self.model, self.device)
        self.images_per_step = stream.config.batch * world_size() * accumulation
        self.stop_signal: int | None = None
        self.batches: Iterator[Batch] = iter(())
        self._clock = (time.perf_counter(), 0)

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Trains to the last step, or to a signal, after which the run can be continued."""
        state, config = self.state, self.config
        check_same_state(self.model)
        self.model.train()
        self._open_stream()
        if state.step == 0:
            self._save()
        with self._signals():
            while state.step < self.total_steps:
                metrics, stop = self.step()
                self._log(metrics)
                if state.non_finite_in_a_row >= config.non_finite_limit:
                    self._return_to_last_good()
                    continue
                if state.step % config.check_ranks_every == 0:
                    check_same_state(self.model)
                self._look()
                if stop or state.step % config.save_every == 0 or state.step == self.total_steps:
                    self._save()
                if stop:
                    return "interrupted"
        return "finished"

    # ---------------------------------------------------------------------------------------------------- one step

    def step(self) -> tuple[Metrics, bool]:
        """One update: gradients over the micro-batches, judged by all ranks together, then applied or skipped.

        Returns this rank's metrics, and whether a rank was asked to stop.
        """
        state = self.state
        torch.manual_seed(derived_seed(self.seed, "step", rank(), state.step))
        for group in state.optimiser.param_groups:
            group["lr"] = state.lr_factor * self.schedule(state.step)
        before = [buffer.clone() for buffer in self.model.buffers()]
        state.optimiser.zero_grad()
        total: Metrics = {}
        for micro in range(self.accumulation):
            self.batch = next(self.batches)
            with self._without_sync() if micro < self.accumulation - 1 else nullcontext():
                metrics = self._backward(self.batch)
            total = {name: total.get(name, 0) + value / self.accumulation for name, value in metrics.items()}
        state.scaler.unscale_(state.optimiser)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        loss, norm_value = torch.stack([total["loss"], norm]).tolist()
        non_finite, stop = self._agree(not math.isfinite(loss + norm_value), self.stop_signal is not None)
        if non_finite:
            torch._foreach_copy_(list(self.model.buffers()), before)
            state.non_finite += 1
            state.non_finite_in_a_row += 1
        elif state.skip_rule.skips(norm_value):
            state.skipped += 1
        else:
            self._apply(norm)
        state.scaler.update()
        state.step += 1
        state.images_seen += self.images_per_step
        return total | {"gradient_norm": norm}, stop

    def _backward(self, batch: Batch) -> Metrics:
        """Forward and backward pass of a micro-batch; gradients add up."""
        state = self.state
        noise = keyed_normal(
            self.model.latent_shapes(len(batch.indices)), batch.indices, self.seed, "latents", self.device
        )
        with self._autocast():
            output: Output = self.parallel(batch.images, noise)
        loss, metrics = self.model.loss(output, state.step / self.total_steps)
        state.scaler.scale(loss / self.accumulation).backward()  # type: ignore[no-untyped-call]
        if self._logs_at(state.step + 1):
            metrics |= _by_group(output)
        return metrics | {"loss": loss.detach()}

    def _apply(self, norm: Tensor) -> None:
        """Clips, updates the weights, then their average."""
        state = self.state
        state.non_finite_in_a_row = 0
        clip = self.schedule.config.clip_norm
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm, foreach=True)
        state.scaler.step(state.optimiser)
        if state.average is not None:
            state.average.update(self.model)

    def _agree(self, non_finite: bool, stop: bool) -> tuple[bool, bool]:
        """Both flags, each true where it is true on any rank."""
        if not is_distributed():
            return non_finite, stop
        flags = sum_over_ranks(torch.tensor([float(non_finite), float(stop)], device=self.device)).tolist()
        return flags[0] > 0, flags[1] > 0

    def _autocast(self) -> AbstractContextManager[Any]:
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = types.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def _without_sync(self) -> AbstractContextManager[Any]:
        """Within, gradients stay on their rank: they are exchanged once, with the last micro-batch."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _open_stream(self) -> None:
        self.batches = self.stream.batches(self.state.images_seen)

    # ------------------------------------------------------------------------------------- when numbers go bad

    def _return_to_last_good(self) -> None:
        """Goes on from the last checkpoint at half the learning rate. Raises UserError after too many returns."""
        state = self.state
        failed_at, returns, factor = state.step, state.returns + 1, state.lr_factor / 2
        if returns > self.config.return_limit:
            raise UserError(
                f"step {failed_at}: the loss or gradients stay non-finite after {returns - 1} returns to a checkpoint; "
                f"first non-finite: {self._first_non_finite()}. Lower optim.lr, lengthen optim.warmup_epochs, raise "
                "model.objective.spectral, clip with optim.clip_norm, or use train.precision=bf16 or fp32"
            )
        content, _ = self.folder.newest()
        assert content is not None
        state.load_state_dict(content)
        state.returns, state.lr_factor = returns, factor
        self._open_stream()
        self.tracker.note(
            f"step {failed_at}: {self.config.non_finite_limit} non-finite updates in a row; "
            f"back to step {state.step} with the learning rate times {factor:g}"
        )

    @torch.no_grad()
    def _first_non_finite(self) -> str:
        """The name of the first module whose output is not finite on the last batch."""
        if not bool(self.batch.images.isfinite().all()):
            return "the images of the batch"
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"the weight {name}"
        found: list[str] = []

        def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(name)

            return hook

        hooks = [module.register_forward_hook(remember(name)) for name, module in self.model.named_modules()]
        with self._autocast():
            self.model(self.batch.images)
        for handle in hooks:
            handle.remove()
        return f"the output of {found[0]}" if found else "a gradient (every module's output is finite)"

    # ------------------------------------------------------------------------------------------------- watching

    def _logs_at(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps

    def _log(self, metrics: Metrics) -> None:
        """One line of numbers, means over ranks, every `log_every` steps."""
        state = self.state
        self.tracker.advance(state.step)
        if not self._logs_at(state.step):
            return
        values = {name: value.float().mean() if value.dim() == 0 else value.float() for name, value in metrics.items()}
        flat = torch.cat([value.reshape(-1).to(self.device) for value in values.values()])
        numbers = iter(mean_over_ranks(flat).tolist())
        named: dict[str, float] = {}
        for name, value in values.items():
            keys = [name] if value.dim() == 0 else [f"{name}/{i:02d}" for i in range(len(value))]
            named |= {key: next(numbers) for key in keys}
        now, (then, images) = time.perf_counter(), self._clock
        self._clock = (now, state.images_seen)
        named |= {
            "learning_rate": state.optimiser.param_groups[0]["lr"],
            "skipped": state.skipped,
            "non_finite": state.non_finite,
            "loss_scale": state.scaler.get_scale(),
            "images_per_second": max(state.images_seen - images, 0) / (now - then),
            "peak_memory_mib": _peak_memory(self.device),
        }
        self.tracker.scalars(state.step, named, shown=("loss", "nelbo", "images_per_second"))

    def _look(self) -> None:
        """Validation and pictures where they are due; the checkpoint with the best bound is kept."""
        state, config = self.state, self.config
        if self._due(config.pictures_every):
            with self._evaluating(averaged=True):
                pictures = self.illustrate(self.model)
            for name, picture in pictures.items():
                self.tracker.picture(state.step, name, picture)
        if self._due(config.validate_every):
            results: dict[str, float] = {}
            for averaged in [False] if state.average is None else [False, True]:
                with self._evaluating(averaged):
                    found = self.validate(self.model)
                prefix = "validation_ema" if averaged else "validation"
                results |= {f"{prefix}/{name}": value for name, value in found.items()}
                bound = found.get("nelbo", math.inf)
            self.tracker.scalars(state.step, results)
            if bound < state.best:
                state.best = bound
                self.folder.save_best(self._content())

    def _due(self, epochs: float | None) -> bool:
        """True at the last step and at multiples of `epochs`."""
        if self.state.step == self.total_steps:
            return True
        steps = None if epochs is None else max(round(epochs * self.stream.epoch_size / self.images_per_step), 1)
        return steps is not None and self.state.step % steps == 0

    @contextmanager
    def _evaluating(self, averaged: bool) -> Iterator[None]:
        """Within, the model is in eval mode, with the averaged weights where there are any."""
        raw = None
        if averaged and self.state.average is not None:
            raw = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.state.average.tensors)
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            if raw is not None:
                self.model.load_state_dict(raw)

    # --------------------------------------------------------------------------------------------------- saving

    def _content(self) -> dict[str, Any]:
        return {"config": self.resolved_config, **self.state.state_dict()}

    def _save(self) -> None:
        """A checkpoint of this step, if every number in it is finite."""
        norms = torch._foreach_norm([t.detach() for t in self.model.state_dict().values() if t.is_floating_point()])
        if bool(torch.stack(list(norms)).isfinite().all()):
            config = self.config
            self.folder.save(self.state.step, self._content(), keep=config.keep, milestone_every=config.milestone_every)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, SIGTERM, SIGINT and SIGUSR1 ask for a stop after the current step."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number

        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, remember) for number in wanted}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def precision_on(device: torch.device, wanted: Precision) -> Precision:
    """What `mixed` means on a device. Raises UserError where the device lacks what was asked for."""
    if wanted == "fp16" and device.type != "cuda":
        raise UserError("train.precision: fp16 needs a CUDA device; on the CPU use fp32 or bf16")
    if wanted != "mixed":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _parallel(model: Family[Any], device: torch.device) -> nn.Module:
    """The model, or the model that exchanges gradients with the other ranks in a few flat buckets."""
    if not is_distributed():
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _by_group(output: Output) -> Metrics:
    """KL (nats) and active units (latent channels whose mean KL is above 0.1 nats) of each group."""
    with torch.no_grad():
        active = [(kl.mean(0) > 0.1).sum() for kl in output.channel_kl]
        return {"kl_group": output.kl.mean(0), "active_units": torch.stack(active).float()}


def _peak_memory(device: torch.device) -> float:
    """MiB: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
