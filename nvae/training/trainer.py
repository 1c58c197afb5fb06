"""Training: one update, the loop around it, and what it does when numbers stop being finite.

The trainer receives built objects; it knows no family, no data set and no command line.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..core.config import Config, flat
from ..core.devices import device_name
from ..core.distributed import check_same_state, rank, sum_over_ranks, world_size
from ..core.errors import UserError
from ..core.precision import Precision, autocast
from ..core.randomness import reseed
from ..data.loading import TrainingStream
from ..kernels.operations import Mode
from ..models.base import Metrics, Recomputation
from .boards import Wandb
from .diagnosis import first_non_finite
from .exchange import Exchange, exchanging, parallel
from .folder import RunFolder, is_milestone
from .graph import Replayed, require_replayable
from .interruption import Interruption
from .optim import Schedule
from .passes import Pass
from .profiling import SKIPPED, Recorder
from .state import BufferCopy, TrainingState
from .throughput import Meter
from .tracking import Tracker
from .watching import Watcher, group_metrics, numbers_of

Outcome = Literal["finished", "interrupted"]


class TrainConfig(Config):
    epochs: float = Field(100.0, gt=0)
    """Length of training in passes over the training images."""
    steps: int | None = Field(None, ge=1)
    """Length of training in updates; takes the place of `epochs`."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """Where to train: `cpu`, `cuda`, `cuda:N` or `mps`; auto: CUDA where there is one."""
    precision: Precision = "fp32"
    """`tf32` lets float32 products round on CUDA; `bf16`, `fp16` (loss-scaled): mixed precision; `mixed`: bf16 on a GPU
    that has it, fp16 on older ones (V100), fp32 on the CPU. Likelihood, KL and penalties stay float32."""
    loss_scale: float = Field(2.0**10, gt=0)
    """Loss scale that fp16 starts with."""
    recompute: Recomputation = "none"
    """What the backward pass computes again to save memory: nothing more than it must, batch norm and swish (NVAE does
    that in any case), or whole cells."""
    kernels: Mode = "auto"
    """How layers are computed: `auto` by the fastest way that agrees with the plain one on this machine, or all
    `plain`."""
    compile: bool = False
    """Compile the model's parts with torch.compile; the first steps then take longer."""
    graph: bool = False
    """On one CUDA device: record the gradients of an update once as a CUDA graph, whose kernels the host then launches
    all at once. It takes more memory, and was never run on a GPU yet."""
    deterministic: bool = False
    """Only algorithms that give the same numbers each time, slower; an operator that has none on the device ends the
    run."""
    profile: int = Field(0, ge=0, le=1000)
    """Updates to record, after the first three of the command: a trace for Chrome or Perfetto, in the run's folder."""
    exchange: Exchange = "fp32"
    """The type in which processes exchange gradients: bf16 sends half as much, and rounds."""
    log_every: int = Field(50, ge=1)
    """Updates between two lines of numbers."""
    validate_every: float | None = Field(None, gt=0)
    """Epochs between two validations (of the averaged weights too); none: only at the end."""
    validation_samples: int = Field(1, ge=1)
    """Importance samples per image in validations."""
    pictures_every: float | None = Field(None, gt=0)
    """Epochs between two sets of pictures (reconstructions, samples); none: only at the end."""
    save_every: int = Field(1000, ge=1)
    """Updates between two checkpoints."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    milestone_every: int | None = Field(None, ge=1)
    """Updates between two checkpoints that are kept for ever."""
    check_ranks_every: int = Field(1000, ge=1)
    """Updates between two checks that all ranks hold the same weights."""
    non_finite_limit: int = Field(10, ge=1)
    """After so many non-finite updates in a row the run goes back to its last checkpoint at half the learning rate."""
    return_limit: int = Field(3, ge=0)
    """After this many such returns the run stops."""
    wandb: Wandb = "none"
    """Show the run in Weights & Biases too: `online`, or `offline`, to be sent later with `wandb sync`."""
    init_from: str | None = None
    """A checkpoint or run folder whose weights a new run starts from; another image size, number of classes or
    likelihood is allowed, and what does not fit then is said and begins anew."""
    timeout_minutes: float = Field(10.0, gt=0)
    """A rank that waits longer than this for the others ends the run."""

    def idle(self) -> dict[str, str]:
        scaled = self.precision in ("fp16", "mixed")
        idle = {} if scaled else {"loss_scale": f"with precision {self.precision} no loss is scaled"}
        if self.steps is not None and self.steps <= SKIPPED:
            idle["profile"] = f"the first {SKIPPED} updates are not recorded, and steps is {self.steps}"
        if world_size() == 1:
            idle["exchange"] = "there is one process"
        return idle


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
        watcher: Watcher,
        interruption: Interruption,
        *,
        accumulation: int,
        precision: Precision,
        resolved_config: dict[str, Any],
    ) -> None:
        """All ranks hold one state. `accumulation`: micro-batches per update; `precision`: one that the device has.

        `resolved_config` goes into every checkpoint.
        """
        self.state, self.stream, self.schedule, self.config = state, stream, schedule, config
        self.folder, self.tracker, self.watcher, self.interruption = folder, tracker, watcher, interruption
        self.accumulation, self.precision, self.resolved_config = accumulation, precision, resolved_config
        self.model, self.seed, self.total_steps = state.model, stream.seed, schedule.total_steps
        self.device = next(self.model.parameters()).device
        self.images_per_step = stream.config.batch * world_size() * accumulation
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = BufferCopy(self.model)
        self.parallel = parallel(self.model, self.device, config.exchange)
        self.meter = Meter(self.model.config, self.device, precision)
        self.recorder = Recorder(folder.path, config.profile, self.device)
        if config.graph:
            require_replayable(self.model, self.device, profiled=config.profile > 0)
        self.gradients = Replayed(self._gradients, recording=config.graph)
        self.stopping = False

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Trains to the last step, or to an interruption, after which the run can be continued."""
        self.model.train()
        self._open_stream()
        try:
            with self.recorder:
                return self._loop()
        finally:
            self.batches.close()

    def _loop(self) -> Outcome:
        state, config = self.state, self.config
        if state.step == 0:
            self._save()
        self._watch()
        while state.step < self.total_steps:
            self._log(self.step())
            self.recorder.advance(state.step)
            if state.non_finite_in_a_row >= config.non_finite_limit:
                self._return_to_last_good()
                continue
            if state.step % config.check_ranks_every == 0:
                check_same_state(self.model)
            if self.stopping or self._saves_at(state.step):
                self._save()
            if self.stopping:
                return "interrupted"
            self._watch()
        return "finished"

    # ---------------------------------------------------------------------------------------------------- one step

    def step(self) -> Metrics:
        """One update: gradients over the micro-batches, judged by all ranks together, then applied or skipped.

        Returns this rank's metrics.
        """
        state = self.state
        reseed(self.device, self.seed, "step", rank(), state.step)
        for group in state.optimiser.param_groups:
            group["lr"] = state.lr_factor * self.schedule(state.step)
        metrics, norm = self._accumulate_gradients()
        non_finite, norm_value = self._judge(metrics["loss"], norm)
        if non_finite:
            self.buffers.put_back()
            self.gradients.forget()
            self.model.after_skip()
            state.non_finite += 1
            state.non_finite_in_a_row += 1
        else:
            state.non_finite_in_a_row = 0
            if state.skip_rule.skips(norm_value):
                self.model.after_skip()
                state.skipped += 1
            else:
                metrics = metrics | self._update(norm)
        state.step += 1
        state.images_seen += self.images_per_step
        return metrics | {"gradient_norm": norm}

    def _accumulate_gradients(self) -> tuple[Metrics, Tensor]:
        """Metrics of the micro-batches of an update, and the norm of its gradients, which the parameters then have."""
        return self.gradients(self._next_pass() for _ in range(self.accumulation))

    def _next_pass(self) -> Pass:
        progress = self.state.step / self.total_steps
        self.last = Pass.of(next(self.batches), self.model, self.seed, progress, on_device=self.config.graph)
        return self.last

    def _gradients(self, passes: Iterable[Pass]) -> tuple[Metrics, Tensor]:
        """Those of the mean loss, unscaled; ranks exchange them once, with the last pass. Nobody waits for the device.

        What buffers were before is remembered.
        """
        state, total = self.state, Metrics()
        self.buffers.take()
        state.optimiser.zero_grad()
        for number, one in enumerate(passes, start=1):
            with exchanging(self.parallel, now=number == self.accumulation):
                loss, metrics = self._loss(self.parallel, one)
                state.scaler.scale(loss / self.accumulation).backward()  # type: ignore[no-untyped-call]
            total = {name: total.get(name, 0) + value / self.accumulation for name, value in metrics.items()}
        state.scaler.unscale_(state.optimiser)
        state.scaler.update()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return total, torch.nn.utils.get_total_norm(gradients, foreach=True)

    def _loss(self, model: nn.Module, one: Pass) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a pass."""
        with autocast(self.device, self.precision):
            output = one.through(model)
        loss, metrics = self.model.loss(output, one.progress)
        if self.config.graph or self._logs_at(self.state.step + 1):
            metrics |= group_metrics(output)
        return loss, metrics | {"loss": loss.detach()}

    def _judge(self, loss: Tensor, norm: Tensor) -> tuple[bool, float]:
        """Whether any rank has a non-finite loss or gradient, and the gradient norm: the step's one synchronisation.

        Ranks tell each other on the way whether one was asked to stop.
        """
        bad = (loss + norm).isfinite().logical_not().to(norm)
        flags = sum_over_ranks(torch.stack([bad, torch.full_like(norm, float(self.interruption.requested))]))
        non_finite, asked, value = torch.cat([flags, norm[None]]).tolist()
        self.stopping = asked > 0
        return non_finite > 0, value

    def _update(self, norm: Tensor) -> Metrics:
        """Clips, updates the weights and what learns otherwise, then their average. Returns the family's metrics.

        Gradients are unscaled and known to be finite: `scaler.step` would only ask the GPU again.
        """
        state, clip = self.state, self.schedule.config.clip_norm
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm, foreach=True)
        state.optimiser.step()
        metrics = self.model.after_update(self.seed, state.step, state.step / self.total_steps)
        if state.average is not None:
            state.average.update()
        return metrics

    def _open_stream(self) -> None:
        self.batches = self.stream.batches(self.state.images_seen)
        self.meter.start(self.state.images_seen)

    # ------------------------------------------------------------------------------------------- when numbers go bad

    def _return_to_last_good(self) -> None:
        """Goes on from the last checkpoint at half the learning rate. Raises UserError after too many returns."""
        state, config = self.state, self.config
        if state.returns == config.return_limit:
            first = first_non_finite(self.model, self.last.images, lambda: self._loss(self.model, self.last)[0])
            raise UserError(
                f"step {state.step}: the loss or gradients stay non-finite after {state.returns} returns to a "
                f"checkpoint; first to be non-finite: {first}. Lower optim.lr, lengthen optim.warmup_epochs, clip with "
                "optim.clip_norm, strengthen the model's penalties, or take train.precision=bf16 or fp32"
            )
        content = self.folder.newest()
        if content is None:
            raise UserError("the weights that the run starts from are not finite")
        failed_at, non_finite = state.step, state.non_finite
        returns, factor = state.returns + 1, state.lr_factor / 2
        state.load_state_dict(content)
        self.gradients.forget()
        state.returns, state.lr_factor, state.non_finite, state.non_finite_in_a_row = returns, factor, non_finite, 0
        self.tracker.rewind(state.step, state.log_lines)
        self.tracker.scalars(state.step, {"returned_from": failed_at, "returns": returns, "lr_factor": factor})
        self.tracker.note(
            f"step {failed_at}: {config.non_finite_limit} non-finite updates in a row; "
            f"back to step {state.step}, learning rate × {factor:g} from now on"
        )
        self.batches.close()
        self._open_stream()

    # ----------------------------------------------------------------------------------------------------- watching

    def _logs_at(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps

    def _log(self, metrics: Metrics) -> None:
        """One line of numbers, means over ranks, every `log_every` steps."""
        state = self.state
        self.tracker.advance(state.step)
        if not self._logs_at(state.step):
            return
        numbers = numbers_of(metrics, self.model.config, self.device) | {
            "epoch": state.images_seen / self.stream.epoch_size,
            "learning_rate": state.optimiser.param_groups[0]["lr"],
            "skipped": state.skipped,
            "non_finite": state.non_finite,
            "loss_scale": state.scaler.get_scale(),
            **self.meter.read(state.images_seen),
        }
        unit = "bits_per_dim" if "bits_per_dim" in numbers else "nelbo"
        self.tracker.scalars(state.step, numbers, shown=("loss", unit, "images_per_second"))

    def _watch(self) -> None:
        """Validation and pictures where they are due and not yet done; the checkpoint with the best bound is kept."""
        state, config = self.state, self.config
        pictures_due, validation_due = self._due(config.pictures_every), self._due(config.validate_every)
        if state.watched == state.step or not (pictures_due or validation_due):
            return
        if pictures_due:
            self._show_pictures()
        if validation_due:
            self._validate()
        state.watched = state.step
        self._save()
        self.meter.start(self.state.images_seen)

    def _due(self, epochs: float | None) -> bool:
        """True at the last step and at multiples of `epochs`."""
        if self.state.step == self.total_steps:
            return True
        steps = None if epochs is None else max(round(epochs * self.stream.epoch_size / self.images_per_step), 1)
        return steps is not None and self.state.step % steps == 0

    def _show_pictures(self) -> None:
        with self._evaluating(averaged=True):
            pictures = self.watcher.pictures(self.model)
        for name, picture in pictures.items():
            self.tracker.picture(self.state.step, name, picture)

    def _validate(self) -> None:
        """Bounds with the weights and with their average, which then decides which checkpoint is best."""
        state = self.state
        results: dict[str, float] = {}
        for averaged in (False, True) if state.average is not None else (False,):
            with self._evaluating(averaged):
                bounds = self.watcher.bounds(self.model)
            results |= {f"{'validation_ema' if averaged else 'validation'}/{name}": v for name, v in bounds.items()}
        self.tracker.scalars(state.step, results)
        criterion = bounds["bound"] if "bound" in bounds else bounds["criterion"]
        if criterion < state.best:
            state.best = criterion
            self.folder.save_best(self._content())
        if state.step == self.total_steps:
            self.tracker.hyperparameters(flat(self.resolved_config), {f"final/{k}": v for k, v in bounds.items()})

    @contextmanager
    def _evaluating(self, averaged: bool) -> Iterator[None]:
        """Within, the model is in eval mode, with the averaged weights where there are any."""
        average = self.state.average if averaged else None
        self.model.eval()
        try:
            with average.in_model() if average is not None else nullcontext():
                yield
        finally:
            self.model.train()

    # ------------------------------------------------------------------------------------------------------- saving

    def _saves_at(self, step: int) -> bool:
        config = self.config
        return step % config.save_every == 0 or step == self.total_steps or is_milestone(step, config.milestone_every)

    def _save(self) -> None:
        """A checkpoint of now: none amid non-finite updates, lest the run return there, nor one with such a number."""
        state, config = self.state, self.config
        if state.non_finite_in_a_row and state.step < self.total_steps:
            return
        if not state.is_finite():
            return self._return_to_last_good()
        self.tracker.flush()
        state.log_lines = self.tracker.log_lines
        self.folder.save(state.step, self._content(), keep=config.keep, milestone_every=config.milestone_every)

    def _content(self) -> dict[str, Any]:
        return {"config": self.resolved_config, **self.state.state_dict()}
