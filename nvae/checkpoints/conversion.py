"""Converting checkpoints between the published formats and ours (spec §9; spec_vdvae, Published checkpoints)."""

from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .format import is_ours, save_checkpoint, write_checkpoint
from .loading import (
    PUBLISHED_FORMATS,
    PublishedFormat,
    checkpoint_file,
    config_from,
    model_of,
    published_format,
    read_checkpoint,
)


def convert(
    source: Path, target: Path, *, config: Path | None = None, dataset: str | None = None, overwrite: bool = False
) -> str:
    """Writes `target` in the other format than `source` is in; returns a line that says what was done.

    `config` is the recipe of a published checkpoint that carries no hyper-parameters, `dataset` the published name of
    the set for one that does; where they would have no effect they are refused. A converted published checkpoint keeps
    the published mixture edge. Raises UserError, also where `target` exists, unless told to `overwrite` it; never is it
    the checkpoint that is converted.
    """
    file = checkpoint_file(source)
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name a file in it")
    if target.exists() and target.samefile(file):
        raise UserError(f"{target}: is what is to be converted; name another file")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; name another file, or --overwrite it")
    content = read_checkpoint(file)
    if is_ours(content):
        _refuse("--config", config, "one of ours carries its own")
        return _to_published(source, content, target, dataset)
    form = published_format(content)
    if form is None:
        raise UserError(f"{source}: neither a published checkpoint nor one of ours")
    _refuse("--dataset", dataset, "what is written says which model it is")
    if form.CARRIES_CONFIG:
        _refuse("--config", config, "the checkpoint carries its own hyper-parameters")
    return _to_ours(form, source, content, target, config)


def _refuse(option: str, value: object, reason: str) -> None:
    if value is not None:
        raise UserError(f"{option}: has no effect here, {reason}; leave it out (found {value})")


def _to_ours(form: PublishedFormat, source: Path, content: dict[str, Any], target: Path, config: Path | None) -> str:
    try:
        model = form.from_published(content, config=None if config is None else config_from(config))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    saved = {"config": {"model": model.config.model_dump(mode="json")}, "model": model.state_dict(), "ema": None}
    save_checkpoint(target, {**saved, "published": form.origin(content)})
    return f"{target}: ours, from a published checkpoint; mixture edge: {model.config.likelihood.edge}"


def _to_published(source: Path, content: dict[str, Any], target: Path, dataset: str | None) -> str:
    model, _ = model_of(content, edge=None, weights="ema")
    form = next((form for form in PUBLISHED_FORMATS if isinstance(model, form.FAMILY)), None)
    if form is None:
        raise UserError(f"{source}: no published format holds models of {type(model).__name__}")
    published = form.content_of(model, content.get("published") or {}, dataset)
    write_checkpoint(target, published)
    return f"{target}: a published checkpoint, from ours"
