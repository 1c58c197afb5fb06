"""A model folder: one set of weights and what a person needs to know of them, to be given to others.

`model.safetensors` has the weights by name, `config.yaml` says what model they are of, and README.md is for people.
Nothing in it is unpickled, and no code that its config names is imported unless the reader says so.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, NamedTuple, cast, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.config import read_yaml, shortened
from ..core.errors import UserError
from ..core.files import atomic_file, naming
from ..models.registry import FAMILIES

WEIGHTS, CONFIG, CARD, SAMPLES = "model.safetensors", "config.yaml", "README.md", "samples.png"
PROGRAMS = ("sampler.pt2", "encoder.pt2", "sampler.onnx", "sampler.onnx.data")
FILES = (SAMPLES, *PROGRAMS, CARD, CONFIG, WEIGHTS)
"""All that may be in one, in the order in which they take the place of earlier ones."""
FORMAT, VERSION = "nvae-model", 1
DESCRIPTION = "nvae"
"""The one name in the weights file's own metadata, whose order of several would be another in each file: of JSON."""

Held = Literal["ema", "raw", "published"]
"""What weights are: published ones do not say whether they are averaged."""


class Shared(NamedTuple):
    """What a model folder holds."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    held: Held
    updates: int | None
    """That the weights have seen; None where nobody knows."""


def is_model_folder(path: Path) -> bool:
    """Whether a folder has weights as model folders have them."""
    return (path / WEIGHTS).is_file()


def read_model_folder(file: Path, trust_code: bool = False) -> Shared:
    """What the folder of a weights file holds, on the CPU.

    The weights are held against the digest that was written with them. Raises UserError for files that are missing,
    damaged or of another format, and for a config whose family is code of somebody's, unless `trust_code`.
    """
    said, weights = _read(file)
    if said.get("format") != FORMAT:
        raise UserError(f"{file}: not the weights of a model folder of this package")
    if said.get("version") != VERSION:
        found = shortened(said.get("version"))
        raise UserError(f"{file}: a model folder of format {found}, this version of nvae reads format {VERSION}")
    if said.get("digest") != digest(weights):
        raise UserError(f"{file}: damaged, the weights are not as they were written")
    held, updates = said.get("weights"), said.get("updates")
    if held not in get_args(Held) or not (updates is None or (type(updates) is int and updates > 0)):
        raise UserError(f"{file}: damaged, its description is none of this package")
    config = read_yaml(file.with_name(CONFIG))
    if not trust_code:
        _require_known(config, file.with_name(CONFIG))
    return Shared(config, weights, cast(Held, held), updates)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a safetensors file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as opened:
            return _description(opened), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged or truncated, or not a safetensors file") from error


def _description(opened: Any) -> dict[str, Any]:
    """What is said of the weights; nothing in a file of others."""
    said = json.loads((opened.metadata() or {}).get(DESCRIPTION, "{}"))
    return said if isinstance(said, dict) else {}


def _require_known(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a family that is not of this package: its module could be anybody's."""
    section = config.get("model")
    name = section.get("family", "nvae") if isinstance(section, Mapping) else "nvae"
    if isinstance(name, str) and ":" in name and name not in FAMILIES:
        raise UserError(
            f"{file}: model.family: '{shortened(name)}' is code from elsewhere, which a model folder may not have "
            "imported; if you know and trust it, load_model(…, trust_code=True), or --trust-code"
        )


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- writing


def write_weights(folder: Path, weights: Mapping[str, Tensor], held: Held, updates: int | None) -> None:
    """Writes the weights file of a model folder."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    said = {"format": FORMAT, "version": VERSION, "weights": held, "updates": updates, "digest": digest(plain)}
    write(folder, WEIGHTS, safetensors.torch.save(plain, {DESCRIPTION: json.dumps(said)}))


def write(folder: Path, name: str, content: bytes) -> None:
    """Writes one of the files of a model folder."""
    assert name in FILES
    with atomic_file(folder / name) as file:
        file.write(content)


@contextmanager
def new_model_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends, and is gone where that fails.

    Raises UserError, before anything is done, where `folder` is something already; `overwrite` lets it replace a model
    folder, of which files that are none of ours stay.
    """
    require_free(folder, overwrite)
    absolute = Path(folder).absolute()
    staged = absolute.with_name(f".{absolute.name}.{uuid.uuid4().hex}")
    with naming(folder):
        staged.mkdir(parents=True)
    try:
        yield staged
        _put(staged, absolute)
    finally:
        rmtree(staged, ignore_errors=True)


def require_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a model folder must not be written."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not _is_ours(folder):
        raise UserError(f"{folder}: has other things in it than a model that was exported; name another folder")
    if not overwrite:
        raise UserError(f"{folder}: is an exported model already; name another folder, or --overwrite it")


def _is_ours(folder: Path) -> bool:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            return _description(opened).get("format") == FORMAT and (folder / CONFIG).is_file()
    except (SafetensorError, OSError, ValueError):
        return False


def _put(staged: Path, folder: Path) -> None:
    """Makes what was staged the folder's content."""
    with naming(folder):
        if not folder.exists():
            staged.rename(folder)
            return
        for name in FILES:
            if (staged / name).exists():
                (staged / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
