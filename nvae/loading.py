"""One door for weights: `load_model` takes a run folder, a checkpoint of ours, or a published one."""

import warnings
from pathlib import Path
from typing import Any, Literal

from .checkpoint import is_ours, read_safely
from .config import UserError, read_yaml, validate
from .likelihoods import MixtureEdge
from .models.base import Family, ModelConfig
from .models.registry import build, family
from .published import SAFE_TYPES, from_published, is_published

Weights = Literal["ema", "raw"]


def load_model(
    path: str | Path,
    config: str | Path | ModelConfig | None = None,
    mixture_edge: MixtureEdge | None = None,
    weights: Weights = "ema",
) -> Family[Any]:
    """The model of a run folder (its newest checkpoint), of a checkpoint, or of a published checkpoint, in eval mode.

    `config` (a YAML with a `model` section, or a ModelConfig) is for checkpoints that carry none. `mixture_edge`
    overrides the edge of the logistic mixture: by default a published checkpoint keeps the published one, and a
    warning says so. `weights` "ema" takes the averaged weights where there are any. Raises UserError.
    """
    content = read_safely(checkpoint_file(Path(path)), SAFE_TYPES)
    try:
        if is_ours(content):
            return _ours(content, mixture_edge, weights)
        if is_published(content):
            return _published(content, mixture_edge)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: neither a checkpoint of this package nor a published one")


def checkpoint_file(path: Path) -> Path:
    """The checkpoint a path stands for: itself, or the newest one of a run folder."""
    if not path.is_dir():
        return path
    checkpoints = sorted((path / "checkpoints").glob("step-*.pt"))
    if not checkpoints:
        raise UserError(f"{path}: a folder without checkpoints/step-*.pt; has the run saved one yet?")
    return checkpoints[-1]


def _published(content: dict[str, Any], edge: MixtureEdge | None) -> Family[Any]:
    model = from_published(content, edge or "published")
    if edge is None and model.config.likelihood.kind == "logistic_mixture":
        warnings.warn(
            "published checkpoint: the likelihood keeps the published mixture edge, so that published figures are "
            'reproduced; its bits/dim come out too good. Ask for mixture_edge="right" for exact ones.',
            stacklevel=4,
        )
    return model


def _ours(content: dict[str, Any], edge: MixtureEdge | None, weights: Weights) -> Family[Any]:
    config = model_config(content["config"], "config")
    if edge is not None:
        likelihood = config.likelihood.model_copy(update={"edge": edge})
        config = config.model_copy(update={"likelihood": likelihood})
    model = build(config)
    state = (content.get("ema") if weights == "ema" else None) or content["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError("its weights are of another model than its config describes") from error
    model.mark_loaded()
    return model.eval()


def model_config(config: dict[str, Any], source: str) -> ModelConfig:
    """The validated `model` section of a config, of the family it names."""
    section = config.get("model")
    if not isinstance(section, dict):
        raise UserError(f"{source}: has no model section")
    return validate(family(section.get("family", "nvae")).config_type, section, f"{source}: model")


def config_from(config: str | Path | ModelConfig) -> ModelConfig:
    """A ModelConfig as given, or that of a YAML file."""
    if isinstance(config, ModelConfig):
        return config
    return model_config(read_yaml(Path(config)), str(config))
