"""One door for weights: `load_model` takes a run, a checkpoint of ours, a model folder, or a published checkpoint."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from torch import Tensor, nn

from ..bricks.likelihoods import MixtureEdge
from ..core.config import nearest, read_yaml, shortened, validate
from ..core.errors import UserError
from ..models.base import Family
from ..models.config import ModelConfig
from ..models.nvae import published
from ..models.registry import build, family
from ..models.vdvae import published as published_vdvae
from ..models.vqvae import published as published_vqvae
from .format import FORMAT, VERSION, is_ours, read_safely, require_version
from .model_folder import WEIGHTS, Held, is_model_folder, read_model_folder
from .pretrained import known_path, pretrained_models

Weights = Literal["ema", "raw"]


WRAPPER, COMPILED = "module.", "_orig_mod."
"""What DistributedDataParallel puts before every name, and torch.compile before each of what it compiled."""


class Loaded(NamedTuple):
    """What a checkpoint gives."""

    model: Family[Any]
    weights: Held
    file: Path
    config: dict[str, Any] | None
    """Of the run that it is of, as it was saved; None for a checkpoint of no run."""
    updates: int | None = None
    """That the weights have seen; None where nobody knows."""


class PublishedFormat(Protocol):
    """How the published code of a family writes its checkpoints."""

    FAMILY: type[Family[Any]]
    """Of its models."""
    CARRIES_CONFIG: bool
    """Whether its checkpoints say what model they are of."""

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


PUBLISHED_FORMATS: tuple[PublishedFormat, ...] = (published, published_vdvae, published_vqvae)


def load_model(
    path: str | Path,
    config: str | Path | ModelConfig | None = None,
    mixture_edge: MixtureEdge | None = None,
    weights: Weights = "ema",
    trust_code: bool = False,
) -> Family[Any]:
    """The model of a run folder (its newest checkpoint), of a checkpoint, of a model folder, of one that ships with the
    package (by its name), or of a published checkpoint, in eval mode.

    `config` (a YAML with a `model` section, or a ModelConfig) is for checkpoints that carry none. `mixture_edge`
    overrides the edge of the logistic mixture: by default a published checkpoint keeps the published one, and a
    warning says so. `weights` "ema" takes the averaged weights where there are any; a model folder has one set.
    `trust_code` lets a model folder name a family of somebody's own, whose module is then imported. Raises UserError.
    """
    given = None if config is None else config_from(config)
    return load_checkpoint(path, given, mixture_edge, weights, trust_code).model


def load_checkpoint(
    path: str | Path,
    config: ModelConfig | None = None,
    mixture_edge: MixtureEdge | None = None,
    weights: Weights = "ema",
    trust_code: bool = False,
) -> Loaded:
    """As `load_model`, and which weights the model has."""
    file = checkpoint_file(Path(path))
    content = read_checkpoint(file, trust_code)
    try:
        if is_ours(content):
            model, held = model_of(content, mixture_edge, weights)
            of_a_run = content["config"] if "data" in content["config"] else None
            return Loaded(model, held, file, of_a_run, _updates(content))
        if (form := published_format(content)) is not None:
            return Loaded(_published(form, content, mixture_edge, config), "published", file, None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: neither a checkpoint of this package nor a published one")


def _updates(content: dict[str, Any]) -> int | None:
    """Those that the weights of a checkpoint of ours have seen; None where it tells of none."""
    counters = content.get("counters")
    step = counters.get("step") if isinstance(counters, dict) else None
    return step if isinstance(step, int) and step > 0 else None


def read_checkpoint(file: Path, trust_code: bool = False) -> dict[str, Any]:
    """What a checkpoint file holds; the weights of a foreign one by the names that they have in their model.

    Those of a model folder are a checkpoint of ours; `trust_code` is for its family.
    """
    if file.suffix == ".safetensors":
        return _as_checkpoint(file, trust_code)
    content = read_safely(file, published.SAFE_TYPES)
    if is_ours(content):
        return content
    inside = {key: unwrapped(value) if isinstance(value, dict) else value for key, value in content.items()}
    return unwrapped(inside)


def _as_checkpoint(file: Path, trust_code: bool) -> dict[str, Any]:
    """A model folder in the form of a checkpoint of ours."""
    shared = read_model_folder(file, trust_code)
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": shared.config,
        "model": shared.weights,
        "held": shared.held,
        "counters": {"step": shared.updates or 0},
    }


def unwrapped(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights saved from within DistributedDataParallel or torch.compile, by the names that they have without."""
    if not all(isinstance(name, str) for name in weights):
        return weights
    plain = {name.replace(COMPILED, ""): weight for name, weight in weights.items()}
    if plain and all(name.startswith(WRAPPER) for name in plain):
        return {name.removeprefix(WRAPPER): weight for name, weight in plain.items()}
    return plain


def published_format(content: dict[str, Any]) -> PublishedFormat | None:
    """The published code that wrote a checkpoint; None for one that none did."""
    return next((form for form in PUBLISHED_FORMATS if form.is_published(content)), None)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint a path stands for: itself, the newest one of a run folder, or the weights of a model folder.

    The name of a model that ships with the package, where nothing else is there, stands for its folder.
    """
    path = known_path(path)
    if not path.is_dir():
        _require_name_known(path)
        return path
    if is_model_folder(path):
        return path / WEIGHTS
    checkpoints = sorted((path / "checkpoints").glob("step-*.pt"))
    if not checkpoints:
        raise UserError(f"{path}: a folder without checkpoints/step-*.pt; has the run saved one yet?")
    return checkpoints[-1]


def _require_name_known(path: Path) -> None:
    """Raises UserError for a bare name of which there is neither a file nor a model that ships."""
    if len(path.parts) == 1 and not path.suffix and not path.exists():
        ours = nearest(path.name, pretrained_models()) or "; there are none here"
        raise UserError(f"{path}: no such checkpoint, nor a model that ships with nvae{ours}")


def _published(
    form: PublishedFormat, content: dict[str, Any], edge: MixtureEdge | None, config: ModelConfig | None
) -> Family[Any]:
    model = form.from_published(content, edge or "published", config)
    require_finite(model)
    if edge is None and not model.config.likelihood.sums_to_one:
        warnings.warn(
            "published checkpoint: the likelihood keeps the published mixture edge, so that published figures are "
            'reproduced; its bits/dim come out too good. Ask for mixture_edge="right" for exact ones.',
            stacklevel=4,
        )
    return model


def model_of(content: dict[str, Any], edge: MixtureEdge | None, weights: Weights) -> tuple[Family[Any], Held]:
    """The model of a checkpoint of ours, in eval mode, and what its weights are. Raises UserError."""
    require_version(content)
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError("a checkpoint without a config or without a model")
    config = model_config(content["config"], "config")
    model = build(config if edge is None else config.with_likelihood(edge=edge))
    averaged = content.get("ema") if weights == "ema" else None
    held: Held = "published" if content.get("published") is not None else "raw"
    if content.get("held") in get_args(Held):
        held = content["held"]
    if not isinstance(averaged, Mapping | None):
        raise UserError(f"averaged weights that are no tensors by name: {shortened(averaged)}")
    load_weights(model, averaged or content["model"])
    return model.eval(), "ema" if averaged else held


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights into a model. Raises UserError, naming a tensor, for those of another model and for non-finite ones."""
    own = model.state_dict()
    reason = unlike(own, weights)
    if reason is None:
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            reason = _unmatched(own, weights)
    if reason is not None:
        raise UserError(f"the weights are of another model than the config describes: {reason}")
    require_finite(model)


def unlike(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """The first of some weights that cannot be put into the place of that name: no tensor, another kind or shape."""
    if not isinstance(weights, Mapping):
        return "no tensors by name"
    for name, found in weights.items():
        if not isinstance(name, str) or not isinstance(found, Tensor):
            return f"'{name}' is no tensor with a name"
        place = own.get(name, found)
        if (place.layout, place.is_floating_point()) != (found.layout, found.is_floating_point()) or found.is_complex():
            return f"'{name}' is {found.dtype}, {found.layout}, not {place.dtype}"
        if place.shape != found.shape:
            return f"'{name}' is {tuple(found.shape)}, not {tuple(place.shape)}"
        if found.is_meta and not place.is_meta:
            return f"'{name}' has no numbers"
    return None


def _unmatched(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first tensor that is missing or unknown."""
    missing = own.keys() - weights.keys()
    return f"'{min(missing)}' is missing" if missing else f"'{min(weights.keys() - own.keys())}' is unknown"


def require_finite(model: nn.Module) -> None:
    """Raises UserError, naming the first tensor with a number that is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"the weights are not finite, first at '{name}'")


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
