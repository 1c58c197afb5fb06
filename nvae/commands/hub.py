"""`nvae.push_to_hub`: a run, or a model folder, onto the Hugging Face hub.

What only a run needs is imported once there is one: `import nvae` imports this module.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from ..checkpoints.hub import require_hub_id, upload
from ..checkpoints.model_folder import is_model_folder
from ..core.errors import UserError


def push_to_hub(source: str | Path, repo_id: str, *, licence: str | None = None, private: bool = False) -> str:
    """Puts a model onto the hub as `repo_id`, user/name, and returns its address.

    `source` is a model folder, which goes there as it is, or whatever else holds a model: a run, a checkpoint. That is
    exported first, with `licence` in its card. The token is huggingface_hub's (`hf auth login`). Raises UserError.
    """
    require_hub_id(repo_id)
    if is_model_folder(Path(source)):
        if licence is not None:
            raise UserError(f"licence: has no effect, a model folder's card says its own; leave out {licence}")
        return upload(Path(source), repo_id, private=private)
    return _exported_and_pushed(Path(source), repo_id, licence, private)


def _exported_and_pushed(source: Path, repo_id: str, licence: str | None, private: bool) -> str:
    import torch

    from .export import Wanted, export
    from .subject import open_subject

    with TemporaryDirectory() as folder:
        out = Path(folder) / repo_id.rpartition("/")[2]
        export(open_subject(source, device=torch.device("cpu")), out, Wanted(licence))
        return upload(out, repo_id, private=private)
