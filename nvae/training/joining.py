"""One run of several that trained parts of a model, at the same time on different machines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.loading import Loaded, Weights, load_checkpoint, read_checkpoint
from ..core.config import dump_yaml
from ..core.errors import UserError
from ..models.base import Family
from .config import AnyRunConfig, run_config
from .content import IMAGES, Content, content_in, text_of
from .folder import RunFolder


def join(parts: Sequence[Path], name: str, folder: RunFolder) -> AnyRunConfig:
    """Writes the run of all parts, each a run or a checkpoint of one, into a new folder; returns its config.

    Data, schedule and the like are the first part's. The new run evaluates and samples; it has no moments to train on
    with. Raises UserError for parts that do not fit together, and where the folder is a run already.
    """
    if len(set(parts)) != len(parts):
        raise UserError("a part is given twice")
    if (folder.path / "config.yaml").exists() or folder.newest() is not None:
        raise UserError(f"{folder.path}: is a run already; choose another name")
    raw, averaged = _loaded(parts, "raw"), _loaded(parts, "ema")
    written = [_written(part, loaded) for part, loaded in raw.items()]
    content = _one_content({part: loaded.file for part, loaded in raw.items()})
    model, is_averaged = joined(raw), any(loaded.weights == "ema" for loaded in averaged.values())
    average = joined(averaged) if is_averaged else None
    section = model.config.model_dump(mode="json")
    config = run_config({**written[0], "name": name, "model": section}, str(folder.path))
    counters = read_checkpoint(next(iter(raw.values())).file)["counters"]
    saved = {
        "config": config.model_dump(mode="json"),
        "model": model.state_dict(),
        "ema": None if average is None else average.state_dict(),
        "optimiser": {},
        "scaler": {},
        "skip_rule": {"norms": [], "in_a_row": 0},
        "counters": {**counters, "log_lines": 0},
    }
    with folder.locked():
        folder.begin(dump_yaml(config))
        folder.write(IMAGES, text_of(content))
        folder.save(counters["step"], saved, keep=1, milestone_every=None)
        folder.record_outcome("finished")
    return config


def joined(parts: dict[str, Loaded]) -> Family[Any]:
    """One model of parts, by the names that messages give them. Raises UserError."""
    models = {name: loaded.model for name, loaded in parts.items()}
    (name, first), *others = models.items()
    for other, model in others:
        if type(model) is not type(first):
            raise UserError(f"{other}: a {type(model).__name__}, but {name} is a {type(first).__name__}")
    return type(first).joined(models)


def _loaded(parts: Sequence[Path], weights: Weights) -> dict[str, Loaded]:
    """The parts by their names."""
    return {str(part): load_checkpoint(part, weights=weights) for part in parts}


def _written(name: str, loaded: Loaded) -> dict[str, Any]:
    """The config of a part's run. Raises UserError for a checkpoint of none."""
    if loaded.config is None:
        raise UserError(f"{name}: not a run, nor a checkpoint of one")
    return loaded.config


def _one_content(files: dict[str, Path]) -> dict[str, Content]:
    """The images of all parts, as far as they say. Raises UserError where they were trained on different ones."""
    found: tuple[str, dict[str, Content]] | None = None
    for name, file in files.items():
        content = content_in(file.parent.parent)
        if content and found is None:
            found = name, content
        if content and found is not None and content.get("train") != found[1].get("train"):
            raise UserError(f"{name}: was trained on other images than {found[0]}")
    return {} if found is None else found[1]
