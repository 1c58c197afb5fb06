"""prepare_data.py --codes: the codes of a store's images by a trained first stage, kept in the store."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoints.loading import load_checkpoint
from ..core.devices import device_of
from ..core.errors import UserError
from ..data.codes import Coding, code_lines
from ..data.coding import Coder, make_codes
from ..data.config import DataConfig


def write_codes(store: Path, run: Path, config: DataConfig, *, progress: bool = True) -> Iterator[str]:
    """Makes them, with the averaged weights where there are any; lines for people.

    `config` says how the images are seen in training: `flip` keeps codes of mirror images, too. Raises UserError for a
    model whose images have no codes that can be kept, and for images that it does not take.
    """
    model = load_checkpoint(run).model
    likelihood, config = model.config.likelihood, config.model_copy(update={"path": store})
    if likelihood.kind == "bernoulli":
        raise UserError(
            f"--codes: {run} takes binarised images, which are drawn anew each time and have other codes then; a prior "
            "makes them of each batch"
        )
    size = model.config.visible_size
    if (config.size, config.channels) != (size, model.config.image_channels):
        raise UserError(
            f"--codes: {run} takes images of {size}×{size} with {model.config.image_channels} channels, {store} holds "
            f"{config.size}×{config.size} with {config.channels}"
        )
    coding = Coding(
        made_by=str(run),
        first_stage=model.coding(),
        codes=model.codes,
        maps=tuple((height, width) for *_, height, width in model.latent_shapes(1)),
        padding=likelihood.border,
        mirrored=config.flip,
    )
    device = device_of("auto", "--codes")
    model.to(device)
    seen = config.model_copy(update={"padding": likelihood.border, "binarize": False})
    make_codes(seen, Coder(coding, model.codes_of, device), progress=progress)
    yield from code_lines(store)
