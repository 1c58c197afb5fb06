"""The config of a run: every section, and how it is read from YAML and overrides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field, model_validator

from ..core.config import Config, apply_overrides, read_yaml, validate
from ..data.config import DataConfig
from ..models.config import ModelConfig
from ..models.registry import family
from .optim import OptimConfig
from .trainer import TrainConfig

ModelT = TypeVar("ModelT", bound=ModelConfig)


class RunConfig(Config, Generic[ModelT]):
    """All sections of a run."""

    name: str
    """The run is kept in runs/<name>; by default the config file's name."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
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


def read_run_config(path: Path, overrides: list[str]) -> AnyRunConfig:
    """The config of a YAML file with `section.field=value` overrides."""
    return run_config(apply_overrides({"name": path.stem, **read_yaml(path)}, overrides), str(path))


def load_run(path: Path) -> AnyRunConfig:
    """The config that a run folder, or a checkpoint inside one, was trained with."""
    folder = path if path.is_dir() else path.parent.parent
    return run_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))


def run_config(data: Mapping[str, Any], source: str) -> AnyRunConfig:
    """The validated config of a run, its model section of the family it names. Raises UserError with every error."""
    model = data.get("model")
    name = model.get("family", "nvae") if isinstance(model, Mapping) else "nvae"
    return validate(config_type(name), data, source)


def config_type(name: str = "nvae") -> type[AnyRunConfig]:
    """The config of a run of a family."""
    model: Any = family(name).config_type
    return RunConfig[model]
