"""The recipes of configs/, which lie beside the package in a checkout and inside it once it is installed."""

from pathlib import Path

from ..core.config import nearest
from ..core.errors import UserError

DEFAULT = "digits"
PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def recipe(name: str) -> Path:
    """A YAML file as given; else the recipe of that name: `cifar10`, or as a checkout has it, `configs/cifar10.yaml`.

    Raises UserError where there is neither.
    """
    path = Path(name)
    if path.is_file() or str(path.parent) not in (".", "configs"):
        return path
    for folder in FOLDERS:
        if (found := folder / f"{path.stem if path.suffix == '.yaml' else name}.yaml").is_file():
            return found
    raise UserError(f"{name}: no such file, nor a recipe{nearest(path.stem, recipes()) or '; there are none here'}")


def recipes() -> dict[str, Path]:
    """Every recipe by its name, in the order of names."""
    return dict(sorted((file.stem, file) for folder in FOLDERS for file in folder.glob("*.yaml")))
