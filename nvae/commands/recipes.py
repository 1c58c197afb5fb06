"""The recipes of configs/, which lie beside the package in a checkout and inside it once it is installed."""

from pathlib import Path

from ..core.config import nearest
from ..core.errors import UserError

DEFAULT = "digits"
ABLATIONS = "ablations"
PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def recipe(name: str) -> Path:
    """A YAML file as given; else the recipe of that name: `cifar10`, or as a checkout has it, `configs/cifar10.yaml`.

    Ablations are named with their folder: `ablations/cifar10`. Raises UserError where there is neither.
    """
    path = Path(name)
    asked = name.removeprefix("configs/").removesuffix(".yaml")
    if path.is_file() or str(Path(asked).parent) not in (".", ABLATIONS):
        return path
    for folder in FOLDERS:
        if (found := folder / f"{asked}.yaml").is_file():
            return found
    raise UserError(f"{name}: no such file, nor a recipe{nearest(asked, recipes()) or '; there are none here'}")


def recipes() -> dict[str, Path]:
    """Every recipe by its name, in the order of names, ablations left out."""
    return dict(sorted((file.stem, file) for folder in FOLDERS for file in folder.glob("*.yaml")))
