"""From a config to a trainer: data, model, optimiser and schedule, where the newest checkpoint left them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.loading import load_checkpoint, load_weights
from ..core.distributed import rank, world_size
from ..core.errors import UserError
from ..core.precision import Precision
from ..data.images import Images
from ..data.loading import TrainingStream
from ..data.sets import open_images
from ..models.base import Family
from ..models.registry import build
from .config import AnyRunConfig, run_config
from .continuation import changes, continued, naming_fields, require_same_config, with_global_batch
from .folder import RunFolder
from .interruption import Interruption
from .optim import Averaged, OptimConfig, Schedule, SkipRule, build_optimiser
from .state import TrainingState
from .tracking import Tracker
from .trainer import TrainConfig, Trainer
from .watching import Watcher


class Ready(NamedTuple):
    """A run that was accepted: what is left to do is to train."""

    config: AnyRunConfig
    """With all that it left open: the global batch, what the model settles."""
    trainer: Trainer
    """Its tracker is not open yet."""
    notes: list[str]
    """What the person watching should know."""


def ready(
    config: AnyRunConfig, folder: RunFolder, device: torch.device, precision: Precision, interruption: Interruption
) -> Ready:
    """The run of a config where its newest checkpoint left it, or at its start, in a precision that the device has.

    No file is changed. Raises UserError for whatever stands in the way of training as asked.
    """
    require_same_config(config.model_dump(mode="json"))
    saved = folder.newest()
    before = saved["config"]["data"]["global_batch"] if saved else None
    config = config.model_copy(update={"data": with_global_batch(config.data, before, world_size())})
    data, seed = config.data, config.seed
    images, held_out = open_images(data, "train"), open_images(data, "validation")
    config = _with_settled_model(config, saved, images)
    resolved = config.model_dump(mode="json")
    notes = continued(saved["config"], resolved, allowed=config.allow_changes) if saved else []

    stream = TrainingStream(images, data, seed=seed, device=device, rank=rank(), world=world_size())
    schedule = _schedule(config.optim, config.train, images_per_update(config), stream.epoch_size)
    state = _state(config, device, scales_loss=precision == "fp16")
    if saved is not None:
        with naming_fields(notes):
            state.load_state_dict(saved)
    elif config.train.init_from is not None:
        _start_from(config.train.init_from, state)
    trainer = Trainer(
        state,
        stream,
        schedule,
        config.train,
        folder,
        Tracker(folder.path, schedule.total_steps, state.step, state.log_lines),
        Watcher(held_out, data, importance_samples=config.train.validation_samples, seed=seed, device=device),
        interruption,
        accumulation=images_per_update(config) // (data.batch * world_size()),
        resolved_config=resolved,
    )
    notes = [f"changed since the last checkpoint: {note}" for note in notes]
    return Ready(config, trainer, [*notes, _greeting(config, trainer)])


def images_per_update(config: AnyRunConfig) -> int:
    """As given, or batch × processes."""
    return config.data.global_batch or config.data.batch * world_size()


def _schedule(optim: OptimConfig, train: TrainConfig, images: int, epoch_size: int) -> Schedule:
    """The learning rate over the whole run, whose length in updates it decides; `images`: of an update."""
    steps_per_epoch = epoch_size / images
    total_steps = train.steps or math.ceil(train.epochs * steps_per_epoch)
    return Schedule(optim, total_steps, steps_per_epoch, images)


def _state(config: AnyRunConfig, device: torch.device, *, scales_loss: bool) -> TrainingState:
    """The state that training starts from, the same on every rank."""
    torch.backends.cudnn.benchmark = True  # shapes do not change
    torch.manual_seed(config.seed)
    model: Family[Any] = build(config.model).to(device)
    model.set_recomputation(config.train.recompute)
    if config.train.compile:
        model.compile_parts()
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
        source = load_checkpoint(path, config, mixture_edge=config.likelihood.edge, weights="raw").model
        before, now = ({"model": model.model_dump(mode="json")} for model in (source.config, config))
        with naming_fields(changes(before, now)):
            load_weights(state.model, source.state_dict())
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    state.model.mark_loaded()
    if state.average is not None:
        state.average.restart()


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


def _greeting(config: AnyRunConfig, trainer: Trainer) -> str:
    state = trainer.state
    parameters = sum(p.numel() for p in state.model.parameters())
    begin = "continuing" if state.step else "training"
    return (
        f"{begin} {config.name}: {parameters:,} parameters on {world_size()} × {trainer.device.type}, "
        f"{config.data.global_batch} images per update ({config.data.batch} per process and pass), "
        f"step {state.step} of {trainer.total_steps}"
    )
