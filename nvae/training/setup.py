"""From a config to a trainer: data, model, optimiser and schedule, where the newest checkpoint left them."""

import math
from typing import Any, NamedTuple

import torch

from ..checkpoints.format import require_version
from ..checkpoints.loading import load_checkpoint
from ..core.config import refuse_idle
from ..core.distributed import check_same, rank, world_size
from ..core.errors import UserError
from ..core.precision import Precision
from ..data.codes import StoredCodes
from ..data.loading import TrainingStream
from ..data.sets import open_images
from ..kernels.fusion import compile_each
from ..models.base import Family
from ..models.config import ModelConfig
from ..models.registry import build
from .beginning import begin
from .config import AnyRunConfig, run_config
from .content import Content, changed_images, content_in, content_of
from .continuation import continued, naming_fields, require_same_config, with_global_batch
from .folder import RunFolder
from .interruption import Interruption
from .optim import Averaged, OptimConfig, Schedule, SkipRule, build_optimiser
from .state import TrainingState
from .tracking import Tracker
from .trainer import TrainConfig, Trainer
from .warm_start import start_from
from .watching import Watcher


class Ready(NamedTuple):
    """A run that was accepted: what is left to do is to train."""

    config: AnyRunConfig
    """With all that it left open."""
    content: dict[str, Content]
    """Which images it is trained on, by split."""
    trainer: Trainer
    """Its tracker is not open yet."""
    notes: list[str]
    """What the person watching should know."""


def ready(
    config: AnyRunConfig, folder: RunFolder, device: torch.device, precision: Precision, interruption: Interruption
) -> Ready:
    """The run of a config where its newest checkpoint left it, or at its start, in a precision that the device has.

    No file is changed. Raises UserError for whatever stands in the way of training as asked, ranks that would start
    from different numbers among it.
    """
    require_same_config(config.model_dump(mode="json"))
    saved = folder.newest()
    earlier = _config_in(saved) if saved else None
    before = earlier.data.global_batch if earlier else None
    config = config.model_copy(update={"data": with_global_batch(config.data, before, world_size())})
    if saved is None:  # once such fields were accepted, and a run goes on as it began
        refuse_idle(config)
    data, seed = config.data, config.seed
    images, held_out = open_images(data, "train"), open_images(data, "validation")
    codes = StoredCodes(data, "train") if data.stored_codes else None
    stream = TrainingStream(images, data, seed=seed, device=device, rank=rank(), world=world_size(), codes=codes)
    require_classes(images.labels, held_out.labels, config.model.classes)
    content = content_of({"train": images, "validation": held_out})
    source = _source(config) if saved is None else None
    config = _continuing(config, earlier.model if earlier else source.config if source else None)
    foundation = foundation_of(config)
    config = built_on(config, foundation)
    resolved = config.model_dump(mode="json")
    notes = continued(earlier.model_dump(mode="json"), resolved, allowed=config.allow_changes) if earlier else []
    if saved is not None:
        notes += changed_images(content_in(folder.path), content, allowed=config.allow_changes)
    schedule = _schedule(config.optim, config.train, images_per_update(config), len(images))
    state = _state(config, device, precision)
    warm = [] if source is None else start_from(source, state)
    if saved is not None:
        with naming_fields(folder.checkpoints, notes):
            state.load_state_dict(saved)
    if foundation is not None:
        state.model.take_in(foundation)
    state.model.check_samples(config.train.validation_samples)
    if codes is not None:
        state.model.check_codes(codes.coding.first_stage, codes.coding.made_by)
    check_same(state.tensors(), device)
    if not state.begun:
        begin(state, images, data, seed)
    if config.train.compile:
        compile_each(list(state.model.parts()) or [state.model])
    trainer = Trainer(
        state,
        stream,
        schedule,
        config.train,
        folder,
        _tracker(folder, state, schedule.total_steps, config),
        Watcher(held_out, data, importance_samples=config.train.validation_samples, seed=seed, device=device),
        interruption,
        accumulation=images_per_update(config) // (data.batch * world_size()),
        precision=precision,
        resolved_config=resolved,
    )
    told = [*(f"changed since the last checkpoint: {note}" for note in notes), *warm, _greeting(config, trainer)]
    return Ready(config, content, trainer, told)


def _config_in(saved: dict[str, Any]) -> AnyRunConfig:
    """The config that a checkpoint was saved with. Raises UserError where there is none, and for another format."""
    require_version(saved)
    if not isinstance(saved.get("config"), dict):
        raise UserError("the checkpoint's config: is missing or damaged")
    return run_config(saved["config"], "the checkpoint's config")


def require_classes(labels: torch.Tensor, held_out: torch.Tensor, classes: int) -> None:
    """Raises UserError where a model of classes would see images of others, or none of any; labels are −1 for these."""
    if classes == 0:
        return
    highest = max(int(found.max()) for found in (labels, held_out))
    if highest >= classes:
        raise UserError(f"model.classes: is {classes}, but the images have classes up to {highest}")
    if int(labels.max()) < 0:
        raise UserError(f"model.classes: is {classes}, but no training image has a class")


def images_per_update(config: AnyRunConfig) -> int:
    """As given, or batch × processes."""
    return config.data.global_batch or config.data.batch * world_size()


def _schedule(optim: OptimConfig, train: TrainConfig, images: int, epoch_size: int) -> Schedule:
    """The learning rate over the whole run, whose length in updates it decides; `images`: of an update."""
    steps_per_epoch = epoch_size / images
    total_steps = train.steps or math.ceil(train.epochs * steps_per_epoch)
    return Schedule(optim, total_steps, steps_per_epoch, images)


def _state(config: AnyRunConfig, device: torch.device, precision: Precision) -> TrainingState:
    """The state that training starts from, the same on every rank."""
    torch.manual_seed(config.seed)
    model: Family[Any] = build(config.model).to(device)
    model.set_recomputation(config.train.recompute)
    return TrainingState(
        model,
        build_optimiser(model.parameters(), config.optim),
        SkipRule(config.optim),
        Averaged(model, config.optim.ema, model.copied()) if config.optim.ema is not None else None,
        torch.amp.GradScaler(device.type, init_scale=config.train.loss_scale, enabled=precision == "fp16"),
    )


def _tracker(folder: RunFolder, state: TrainingState, total_steps: int, config: AnyRunConfig) -> Tracker:
    """Where a run is watched, from the step of its state on."""
    wandb, shown = config.train.wandb, config.model_dump(mode="json")
    return Tracker(folder.path, total_steps, state.step, state.log_lines, wandb=wandb, config=shown)


def _source(config: AnyRunConfig) -> Family[Any] | None:
    """The model whose weights a new run starts from, of any checkpoint; None where it starts from none."""
    path, model = config.train.init_from, config.model
    return _model_at(path, "train.init_from", model, mixture_edge=model.likelihood.edge, weights="raw")


def foundation_of(config: AnyRunConfig) -> Family[Any] | None:
    """The model that becomes a part of the run's; None where there is none, or where it already is one."""
    return _model_at(config.model.foundation, f"the model that model.family={config.model.family} is built on")


def _model_at(path: str | None, purpose: str, *args: Any, **options: Any) -> Family[Any] | None:
    """The model of a checkpoint, if one is named; what is wrong with it is told with what it is for."""
    try:
        return None if path is None else load_checkpoint(path, *args, **options).model
    except UserError as error:
        raise UserError(f"{purpose}: {error}") from error


def built_on(config: AnyRunConfig, foundation: Family[Any] | None) -> AnyRunConfig:
    """The config once the model's foundation is known."""
    if foundation is None:
        return config
    return config.model_copy(update={"model": config.model.built_on(foundation.config)})


def _continuing(config: AnyRunConfig, saved: ModelConfig | None) -> AnyRunConfig:
    """The config of a run that goes on from the weights of a model, if there are any."""
    return config if saved is None else config.model_copy(update={"model": config.model.continuing(saved)})


def _greeting(config: AnyRunConfig, trainer: Trainer) -> str:
    state = trainer.state
    parameters = sum(p.numel() for p in state.model.parameters())
    begin = "continuing" if state.step else "training"
    return (
        f"{begin} {config.name}: {parameters:,} parameters on {world_size()} × {trainer.device.type}, "
        f"{config.data.global_batch} images per update ({config.data.batch} per process and pass), "
        f"step {state.step} of {trainer.total_steps}"
    )
