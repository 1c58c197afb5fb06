"""Models by their names: folders, those that ship with the package, and those of the Hugging Face hub.

The hub is reached through huggingface_hub (the extra `hub`), which is imported where it is needed. Functions, and not
its `ModelHubMixin`, which would be a base class of every family and so be imported with the package.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.config import nearest, shortened
from ..core.errors import UserError
from ..models.base import Family
from .loading import load_model
from .model_folder import CARD, CONFIG, FILES, WEIGHTS, is_model_folder, read_model_folder
from .pretrained import known_path, pretrained_models

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""user/name."""
READ = (WEIGHTS, CONFIG, CARD)
"""What is fetched: nothing that would be unpickled or run."""


def from_pretrained(name: str | Path, *, revision: str | None = None, trust_code: bool = False) -> Family[Any]:
    """The model of a folder or checkpoint; else one that ships with the package; else one of the hub, `user/name`.

    `revision` is a branch, tag or commit of the hub. `trust_code` lets a model folder name a family of somebody's own,
    whose module is then imported; none is fetched. In eval mode, on the CPU. Raises UserError.
    """
    path = known_path(Path(name))
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: has no effect, {path} is not of the hub; leave it out (found {revision})")
        return load_model(path, trust_code=trust_code)
    if HUB_ID.fullmatch(str(name)) is None:
        ours = nearest(str(name), pretrained_models()) or "; there are none here"
        raise UserError(f"{shortened(name)}: no such folder, nor user/name of the hub, nor a model that ships{ours}")
    return load_model(fetched(str(name), revision), trust_code=trust_code)


def fetched(repo_id: str, revision: str | None = None) -> Path:
    """The folder, in the hub's own cache, of a model there. Raises UserError."""
    with _hub(repo_id) as hub:
        folder = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(READ)))
    if not is_model_folder(folder):
        raise UserError(f"{repo_id}: is on the hub, but has no {WEIGHTS}: not a model of this package")
    return folder


def require_hub_id(repo_id: str) -> None:
    """Raises UserError for what is no name of a repository of the hub."""
    if HUB_ID.fullmatch(repo_id) is None:
        raise UserError(f"{shortened(repo_id)}: no repository of the hub; its name is user/name")


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Makes a model folder the content of a repository of the hub, which is made if there is none; its address.

    Files of ours that the folder has no longer are gone there too. `private`: only where nobody else can read it; else
    a new one is as the account makes them. Raises UserError, before anything is uploaded.
    """
    require_hub_id(repo_id)
    read_model_folder(folder / WEIGHTS, trust_code=True)  # none that is damaged
    with _hub(repo_id) as hub:
        api = hub.HfApi()
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id}: is there already and is public; make it private first, or name another")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),
            commit_message="A model of nvae",
        )
    return str(address)


@contextmanager
def _hub(repo_id: str) -> Iterator[Any]:
    """Within, huggingface_hub; what the hub, the network or the name refuses is a UserError of one line."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(f"{repo_id}: huggingface_hub is not installed; pip install 'nvae[hub]'") from error
    refusals: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
    try:
        yield huggingface_hub
    except UserError:
        raise
    except refusals as error:
        reason = " ".join(str(error).split()).partition(" for url")[0].rstrip(".")
        raise UserError(f"{repo_id}: the hub: {reason}; to write, or to read what is private: hf auth login") from error
