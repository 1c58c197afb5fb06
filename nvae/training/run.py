"""A run: the config of everything, and the objects it describes, built and put together.

`train` is what train.py does; evaluation and sampling start from `load_run`.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from ..checkpoints.loading import load_model
from ..core import distributed
from ..core.config import Config, apply_overrides, describe, dump_yaml, read_yaml, validate
from ..core.errors import UserError
from ..core.precision import allow_tf32, precision_on
from ..data.config import DataConfig
from ..data.images import Images
from ..data.loading import TrainingStream
from ..data.sets import open_images
from ..models.base import Family, ModelConfig
from ..models.registry import build, family
from .content import changed_images, content_in, content_of, text_of
from .continuation import changes, require_same_config, with_global_batch
from .folder import RunFolder
from .interruption import Interruption, ignore_signals
from .optim import Averaged, OptimConfig, Schedule, SkipRule, build_optimiser
from .state import TrainingState, load_weights
from .tracking import Tracker
from .trainer import Outcome, TrainConfig, Trainer
from .watching import Watcher

ModelT = TypeVar("ModelT", bound=ModelConfig)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75
"""A signal asked for a stop, and the same command continues: EX_TEMPFAIL, "try again", of sysexits.h."""


class RunConfig(Config, Generic[ModelT]):
    """All sections of a run."""

    name: str
    """The run is kept in runs/<name>; by default the config file's name."""
    seed: int = 0
    """Everything random follows from it."""
    model: ModelT
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    allow_changes: bool = False
    """Continue a run although its model, data or schedule was changed."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig[ModelT]":
        data, model = self.data, self.model
        if data.size + 2 * data.padding != model.image_size:
            raise ValueError(
                f"model.image_size: is {model.image_size}, but data.size={data.size} and data.padding={data.padding} "
                f"make {data.size + 2 * data.padding}"
            )
        if data.channels != model.image_channels:
            raise ValueError(f"model.image_channels: is {model.image_channels}, but data.channels is {data.channels}")
        if data.padding != model.likelihood.border:
            raise ValueError(
                f"model.likelihood.border: is {model.likelihood.border}, but data.padding is {data.padding}; "
                "what is padded must not count in the likelihood"
            )
        if data.binarize != (model.likelihood.kind == "bernoulli"):
            raise ValueError(
                f"data.binarize: is {str(data.binarize).lower()}, model.likelihood.kind is {model.likelihood.kind}; "
                "bernoulli takes binarised images, the others do not"
            )
        return self


AnyRunConfig = RunConfig[Any]


# ---------------------------------------------------------------------------------------------------------- configs


def run_config(data: Mapping[str, Any], source: str) -> AnyRunConfig:
    """The validated config of a run, its model section of the family it names. Raises UserError with every error."""
    model = data.get("model")
    name = model.get("family", "nvae") if isinstance(model, Mapping) else "nvae"
    return validate(config_type(name), data, source)


def config_type(name: str) -> type[AnyRunConfig]:
    """The config of a run of a family."""
    model: Any = family(name).config_type
    return RunConfig[model]


def read_run_config(path: Path, overrides: list[str]) -> AnyRunConfig:
    """The config of a YAML file with `section.field=value` overrides."""
    return run_config(apply_overrides({"name": path.stem, **read_yaml(path)}, overrides), str(path))


def load_run(path: Path) -> AnyRunConfig:
    """The config that a run folder, or a checkpoint inside one, was trained with."""
    folder = path if path.is_dir() else path.parent.parent
    return run_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))


def help_text(config: type[Config]) -> str:
    """Every field with its type, default and meaning."""
    lines = []
    for name, kind, default, meaning in describe(config):
        lines.append(f"  {name}  ({kind}; default {default})\n      {meaning}")
    return "\n".join(lines)


def config_help(name: str = "nvae") -> str:
    """The fields of a run of one family."""
    return help_text(config_type(name))


# ---------------------------------------------------------------------------------------------------------- dry run


def dry_run(config: AnyRunConfig) -> str:
    """What would run: the resolved config, parameters by part, latent groups. Nothing is allocated or opened."""
    with torch.device("meta"):
        model = build(config.model)
    total = sum(p.numel() for p in model.parameters())
    lines = [dump_yaml(config), f"parameters: {total:,}"]
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        if count:
            lines.append(f"  {name:<16}{count:>14,}")
    lines.append("latent groups, top-down:")
    for g, (_, channels, height, width) in enumerate(model.latent_shapes(1)):
        lines.append(f"  {g:>3}  {channels} × {height} × {width}")
    lines.append(f"images per update: {_global_batch(config)} ({config.data.batch} per process and pass)")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- training


def train(config: AnyRunConfig, runs: Path = Path("runs")) -> int:
    """Trains, or continues, the run of a config in runs/<name>. Returns the exit code: 0, or 75 when interrupted.

    A rank that fails leaves without a farewell, which the others might never answer.
    """
    with Interruption() as interruption:
        kind = distributed.device_type(config.train.device, "train.device")
        device = distributed.start(kind, config.train.timeout_minutes)
        folder = RunFolder(runs / config.name)
        with folder.locked():
            outcome = _train_in(folder, config, device, interruption)
        distributed.stop()
    return 0 if outcome == "finished" else EXIT_INTERRUPTED


def _train_in(folder: RunFolder, config: AnyRunConfig, device: torch.device, interruption: Interruption) -> Outcome:
    """Trains, and writes down how it ended."""
    folder.record_outcome("running")
    try:
        with _trainer(folder, config, device, interruption) as trainer:
            outcome = trainer.run()
    except torch.OutOfMemoryError as error:
        folder.record_failure(_out_of_memory(config))
        raise UserError(_out_of_memory(config)) from error
    except BaseException as error:
        folder.record_failure(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    folder.record_outcome(outcome)
    distributed.barrier()  # the first process to leave takes the others with it, rank 0 amid its files
    return outcome


@contextmanager
def _trainer(
    folder: RunFolder, config: AnyRunConfig, device: torch.device, interruption: Interruption
) -> Iterator[Trainer]:
    """The trainer of a run where its newest checkpoint left it, or at its start."""
    require_same_config(config.model_dump(mode="json"))
    saved, world = folder.newest(), distributed.world_size()
    before = saved["config"]["data"]["global_batch"] if saved else None
    config = config.model_copy(update={"data": with_global_batch(config.data, before, world)})
    images, held_out = open_images(config.data, "train"), open_images(config.data, "validation")
    content = content_of({"train": images, "validation": held_out})
    config = _with_settled_model(config, saved, images)
    resolved = config.model_dump(mode="json")
    notes = changes(saved["config"], resolved, allowed=config.allow_changes) if saved else []
    if saved is not None:
        notes += changed_images(content_in(folder.path), content, allowed=config.allow_changes)
    folder.write("config.yaml", dump_yaml(config))
    folder.write("images.json", text_of(content))

    rank, data, seed = distributed.rank(), config.data, config.seed
    stream = TrainingStream(images, data, seed=seed, device=device, rank=rank, world=world)
    schedule = _schedule(config, stream.epoch_size)
    state = _state(config, device)
    if saved is not None:
        state.load_state_dict(saved)
    elif config.train.init_from is not None:
        _start_from(config.train.init_from, state)
    watcher = Watcher(
        held_out,
        data,
        importance_samples=config.train.validation_samples,
        seed=seed,
        device=device,
    )
    with Tracker(folder.path, schedule.total_steps, state.step, state.log_lines) as tracker:
        for note in notes:
            tracker.note(f"changed since the last checkpoint: {note}")
        tracker.note(_greeting(config, state, schedule.total_steps, device))
        tracker.text("config", dump_yaml(config))
        yield Trainer(
            state,
            stream,
            schedule,
            config.train,
            folder,
            tracker,
            watcher,
            interruption,
            accumulation=_global_batch(config) // (data.batch * world),
            resolved_config=resolved,
        )


def _schedule(config: AnyRunConfig, epoch_size: int) -> Schedule:
    """The learning rate over the whole run, whose length in updates it decides."""
    steps_per_epoch = epoch_size / _global_batch(config)
    total_steps = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch)
    return Schedule(config.optim, total_steps, steps_per_epoch, _global_batch(config))


def _global_batch(config: AnyRunConfig) -> int:
    """Images per update."""
    return config.data.global_batch or config.data.batch * distributed.world_size()


def _state(config: AnyRunConfig, device: torch.device) -> TrainingState:
    """The state that training starts from, the same on every rank."""
    allow_tf32(config.train.precision)
    torch.backends.cudnn.benchmark = True  # shapes do not change
    torch.manual_seed(config.seed)
    model: Family[Any] = build(config.model).to(device)
    model.set_recomputation(config.train.recompute)
    if config.train.compile:
        model.compile_parts()
    scales_loss = precision_on(device, config.train.precision) == "fp16"
    return TrainingState(
        model,
        build_optimiser(model.parameters(), config.optim),
        SkipRule(config.optim),
        Averaged(model, config.optim.ema) if config.optim.ema is not None else None,
        torch.amp.GradScaler(device.type, init_scale=config.train.loss_scale, enabled=scales_loss),
    )


def _start_from(path: str, state: TrainingState) -> None:
    """A warm start: the weights of any checkpoint, and nothing else of it. Raises UserError for another model's."""
    config = state.model.config
    try:
        source = load_model(path, config, mixture_edge=config.likelihood.edge, weights="raw")
        load_weights(state.model, source.state_dict())
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    state.model.mark_loaded()
    if state.average is not None:
        state.average.restart()


def _out_of_memory(config: AnyRunConfig) -> str:
    """What to change, the least first."""
    data, recompute, precision = config.data, config.train.recompute, config.train.precision
    options = [] if recompute == "cells" else ["train.recompute=cells"]
    options += [] if precision in ("bf16", "fp16", "mixed") else ["train.precision=mixed"]
    options += [] if data.batch == 1 else [f"data.batch={data.batch // 2} data.global_batch={_global_batch(config)}"]
    return (
        f"out of memory with data.batch={data.batch}, train.recompute={recompute} and train.precision={precision}; "
        f"{' or '.join(options) or 'a smaller model'} would need less, and the run goes on from its last checkpoint"
    )


def _with_settled_model(config: AnyRunConfig, saved: Mapping[str, Any] | None, images: Images) -> AnyRunConfig:
    """The config with what its model leaves open: as the run had it before, or measured on its first images."""
    before = run_config(saved["config"], "the checkpoint's config").model if saved else None
    same_family = isinstance(before, type(config.model))
    model = config.model.settled(before if same_family else None, _first_images(images, config))
    return config.model_copy(update={"model": model})


def _first_images(images: Images, config: AnyRunConfig, limit: int = 10_000) -> Iterator[Tensor]:
    """The first images that training sees, at most a whole epoch and the same on every rank: (B, C, H, W) in [0, 1]."""
    stream = TrainingStream(images, config.data, seed=config.seed, device=torch.device("cpu"))
    left = min(limit, stream.epoch_size)
    for batch in stream.batches(start=0):
        yield batch.images[:left]
        left -= len(batch.images)
        if left <= 0:
            return


def _greeting(config: AnyRunConfig, state: TrainingState, total_steps: int, device: torch.device) -> str:
    parameters = sum(p.numel() for p in state.model.parameters())
    where = f"{distributed.world_size()} × {device.type}"
    begin = "continuing" if state.step else "training"
    return (
        f"{begin} {config.name}: {parameters:,} parameters on {where}, {config.data.global_batch} images per update "
        f"({config.data.batch} per process and pass), step {state.step} of {total_steps}"
    )


# --------------------------------------------------------------------------------------------------------- commands


def command(main: Callable[[], int]) -> NoReturn:
    """Runs an entry script: a UserError is printed without a traceback and ends with code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    if code == EXIT_INTERRUPTED:
        ignore_signals()  # those that schedulers repeat would change the code
    sys.exit(code)
