"""One door for weights: `load_model` takes a run folder, a checkpoint of ours, or a published one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from ..bricks.likelihoods import MixtureEdge
from ..core.config import read_yaml, validate
from ..core.errors import UserError
from ..models.base import Family, ModelConfig
from ..models.nvae import published
from ..models.registry import build, family
from ..models.vdvae import published as published_vdvae
from .format import VERSION, is_ours, read_safely

Weights = Literal["ema", "raw"]
Held = Literal["ema", "raw", "published"]
"""What a checkpoint's weights are: a published one does not say whether its are averaged."""


class Loaded(NamedTuple):
    """What a checkpoint gives."""

    model: Family[Any]
    weights: Held


class PublishedFormat(Protocol):
    """How the published code of a family writes its checkpoints."""

    FAMILY: type[Family[Any]]
    """Of its models."""

    def is_published(self, content: dict[str, Any]) -> bool:
        """True for a checkpoint of that code."""

    def from_published(
        self, content: dict[str, Any], edge: MixtureEdge = ..., config: ModelConfig | None = ...
    ) -> Family[Any]:
        """Its model, in eval mode; `config` where the checkpoint carries none. Raises UserError."""

    def origin(self, content: dict[str, Any]) -> dict[str, Any]:
        """What else it says: plain values that a converted checkpoint keeps, for `content_of` to say again."""

    def content_of(self, model: Any, origin: Mapping[str, Any], dataset: str | None) -> dict[str, Any]:
        """The published checkpoint of a model; `dataset` names its set, where that code does. Raises UserError."""


PUBLISHED_FORMATS: tuple[PublishedFormat, ...] = (published, published_vdvae)


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
    return load_checkpoint(path, config, mixture_edge, weights).model


def load_checkpoint(
    path: str | Path,
    config: str | Path | ModelConfig | None = None,
    mixture_edge: MixtureEdge | None = None,
    weights: Weights = "ema",
) -> Loaded:
    """As `load_model`, and which weights the model has."""
    content = read_safely(checkpoint_file(Path(path)), published.SAFE_TYPES)
    known = None if config is None else config_from(config)
    try:
        if is_ours(content):
            return _ours(content, mixture_edge, weights)
        if (form := published_format(content)) is not None:
            return Loaded(_published(form, content, mixture_edge, known), "published")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: neither a checkpoint of this package nor a published one")


def published_format(content: dict[str, Any]) -> PublishedFormat | None:
    """The published code that wrote a checkpoint; None for one that none did."""
    return next((form for form in PUBLISHED_FORMATS if form.is_published(content)), None)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint a path stands for: itself, or the newest one of a run folder."""
    if not path.is_dir():
        return path
    checkpoints = sorted((path / "checkpoints").glob("step-*.pt"))
    if not checkpoints:
        raise UserError(f"{path}: a folder without checkpoints/step-*.pt; has the run saved one yet?")
    return checkpoints[-1]


def _published(
    form: PublishedFormat, content: dict[str, Any], edge: MixtureEdge | None, config: ModelConfig | None
) -> Family[Any]:
    model = form.from_published(content, edge or "published", config)
    if edge is None and not model.config.likelihood.sums_to_one:
        warnings.warn(
            "published checkpoint: the likelihood keeps the published mixture edge, so that published figures are "
            'reproduced; its bits/dim come out too good. Ask for mixture_edge="right" for exact ones.',
            stacklevel=4,
        )
    return model


def _ours(content: dict[str, Any], edge: MixtureEdge | None, weights: Weights) -> Loaded:
    if (version := content.get("version")) != VERSION:
        raise UserError(f"a checkpoint of format {version}, this version of nvae reads format {VERSION}")
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError("a checkpoint without a config or without a model")
    config = model_config(content["config"], "config")
    model = build(config if edge is None else config.with_likelihood(edge=edge))
    averaged = content.get("ema") if weights == "ema" else None
    try:
        model.load_state_dict(averaged or content["model"])
    except RuntimeError as error:
        raise UserError("its weights are of another model than its config describes") from error
    return Loaded(model.eval(), "ema" if averaged else "published" if content.get("published") is not None else "raw")


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
