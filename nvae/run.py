"""A run: the config of everything, and the objects it describes, built and put together.

The entry scripts call `train_command`; evaluation and sampling start from `load_run`.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from . import distributed
from .config import Config, UserError, apply_overrides, describe, dump_yaml, read_yaml, validate
from .data.config import DataConfig
from .data.images import Images
from .data.loading import TrainingStream
from .data.sets import open_images
from .folder import RunFolder
from .loading import load_model
from .models.base import Family, ModelConfig
from .models.registry import build, family
from .optim import Averaged, OptimConfig, Schedule, SkipRule, build_optimiser
from .tracking import Tracker
from .trainer import TrainConfig, Trainer, TrainingState, precision_on
from .watching import illustration, validation

ModelT = TypeVar("ModelT", bound=ModelConfig)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75
"""A signal asked for a stop, and the same command continues: EX_TEMPFAIL, "try again", of sysexits.h."""

FREE_TO_CHANGE = ("name", "data.path", "data.batch", "data.workers", "data.memory", "train.")
FIXED = ("train.epochs", "train.steps")


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
    batch = config.data.global_batch or config.data.batch * distributed.world_size()
    lines.append(f"images per update: {batch} ({config.data.batch} per process and pass)")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- training


def train(config: AnyRunConfig, runs: Path = Path("runs")) -> int:
    """Trains, or continues, the run of a config in runs/<name>. Returns the exit code: 0, or 75 when interrupted."""
    kind = distributed.device_type(config.train.device, "train.device")
    device = distributed.start(kind, config.train.timeout_minutes)
    folder = RunFolder(runs / config.name)
    folder.lock()
    try:
        return _train_in(folder, config, device)
    finally:
        folder.unlock()
        distributed.stop()


def _train_in(folder: RunFolder, config: AnyRunConfig, device: torch.device) -> int:
    saved, problems = folder.newest()
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    config = _with_global_batch(config, saved)
    images = open_images(config.data, "train")
    config = _with_settled_model(config, saved, images)
    if saved is not None:
        _check_changes(saved["config"], config)
    resolved = config.model_dump(mode="json")
    if saved is None or config.allow_changes:
        folder.write("config.yaml", dump_yaml(config))
    _set_precision(config.train)

    stream = TrainingStream(
        images,
        config.data,
        seed=config.seed,
        device=device,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    assert config.data.global_batch is not None
    steps_per_epoch = stream.epoch_size / config.data.global_batch
    total_steps = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch)
    schedule = Schedule(config.optim, total_steps, steps_per_epoch, config.data.global_batch)
    state = _build_state(config, device)
    if saved is not None:
        state.load_state_dict(saved)
    elif config.train.init_from is not None:
        state.model.load_state_dict(load_model(config.train.init_from, weights="raw").state_dict())
        state.model.mark_loaded()
    with Tracker(folder.path, total_steps, state.step) as tracker:
        tracker.note(_greeting(config, state, total_steps, device))
        tracker.text("config", dump_yaml(config))
        trainer = Trainer(
            state,
            stream,
            schedule,
            config.train,
            folder,
            tracker,
            seed=config.seed,
            accumulation=config.data.global_batch // (config.data.batch * distributed.world_size()),
            total_steps=total_steps,
            resolved_config=resolved,
            validate=validation(config.data, config.train.validation_samples, config.seed, device),
            illustrate=illustration(config.data, config.seed, device),
        )
        return _run(trainer, folder)


def _run(trainer: Trainer, folder: RunFolder) -> int:
    """Runs the trainer and writes down how it ended."""
    state = trainer.state
    folder.record_outcome("running", state.step)
    try:
        outcome = trainer.run()
    except torch.OutOfMemoryError as error:
        message = (
            "out of memory: lower data.batch and set data.global_batch to what it was (gradients accumulate), or set "
            "train.recompute=cells, or train.precision=bf16"
        )
        folder.record_outcome("failed", state.step, message)
        raise UserError(message) from error
    except BaseException as error:
        folder.record_outcome("failed", state.step, f"{type(error).__name__}: {error}")
        raise
    folder.record_outcome(outcome, state.step)
    return 0 if outcome == "finished" else EXIT_INTERRUPTED


def _build_state(config: AnyRunConfig, device: torch.device) -> TrainingState:
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


def _with_global_batch(config: AnyRunConfig, saved: Mapping[str, Any] | None) -> AnyRunConfig:
    """The config with its global batch fixed: as given, as the run had it before, or batch × processes."""
    data, world = config.data, distributed.world_size()
    total = data.global_batch
    if total is None:
        total = saved["config"]["data"]["global_batch"] if saved else data.batch * world
    batch = min(data.batch, total // world) if saved else data.batch
    if batch == 0 or total % (batch * world):
        raise UserError(
            f"data.global_batch: {total} images cannot be shared by {world} processes in passes of {batch}; "
            f"data.batch × processes must divide it"
        )
    return config.model_copy(update={"data": data.model_copy(update={"global_batch": total, "batch": batch})})


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


def _check_changes(saved: Mapping[str, Any], config: AnyRunConfig) -> None:
    """Says which fields changed since the run was saved; raises UserError where they change what is trained."""
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k) and k != "allow_changes"]
    refused = [k for k in changed if k.startswith(FIXED) or not k.startswith(FREE_TO_CHANGE)]
    lines = [f"{k}: {before.get(k)} → {now.get(k)}" for k in changed]
    if refused and not config.allow_changes:
        raise UserError(
            f"runs/{config.name} was trained with another config; choose another name=, or pass allow_changes=true:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    for line in lines:
        print(f"changed since the last checkpoint: {line}", file=sys.stderr)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _set_precision(config: TrainConfig) -> None:
    matmul: Literal["high", "highest"] = "high" if config.precision == "tf32" else "highest"
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"


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
    sys.exit(code)
