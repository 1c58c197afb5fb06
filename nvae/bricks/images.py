"""Images as models take them."""

from torch import Tensor

from ..core.errors import UserError


def require_images(images: object, channels: int, size: int, like: Tensor) -> None:
    """Raises UserError for what are not images (B, C, H, W) in [0, 1], of the type and on the device of a weight."""
    if not isinstance(images, Tensor):
        raise UserError(f"images: a tensor is asked for, found {type(images).__name__}")
    shape = (channels, size, size)
    if images.dim() != 4 or tuple(images.shape[1:]) != shape:
        asked = ", ".join(map(str, ("B", *shape)))
        raise UserError(f"images: the model takes ({asked}), found {tuple(images.shape)}")
    if images.dtype != like.dtype:
        raise UserError(f"images: values in [0, 1] of the type {like.dtype} are asked for, found {images.dtype}")
    if images.device != like.device:
        raise UserError(f"images: the model is on {like.device}, they are on {images.device}")
    if images.numel():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise UserError(f"images: values in [0, 1] are asked for, found {low:g} to {high:g}")
