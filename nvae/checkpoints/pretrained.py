"""Trained models that ship with the package: pretrained/, beside it in a checkout and inside it once installed."""

from pathlib import Path

from .model_folder import is_model_folder

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "pretrained", PACKAGE.parent / "pretrained")


def pretrained_models() -> dict[str, Path]:
    """The folder of every model that ships, by its name, in the order of names."""
    found = {path.name: path for folder in FOLDERS if folder.is_dir() for path in folder.iterdir()}
    return dict(sorted((name, path) for name, path in found.items() if is_model_folder(path)))


def ships(folder: Path) -> bool:
    """Whether a folder is one of them."""
    return folder in pretrained_models().values()


def known_path(path: Path) -> Path:
    """A path as given; where nothing is there and it is the name of a model that ships, the folder of that."""
    if len(path.parts) != 1 or path.exists():
        return path
    return pretrained_models().get(path.name, path)
