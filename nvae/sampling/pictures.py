"""Pictures on disk: grids, strips, animations.

Shapes: n images, C channels, H W space, T frames. Images are floats in [0, 1], or uint8.
"""

import io
import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..core.errors import UserError
from ..core.files import atomic_file

VISIBLE = 64
"""Smaller images are enlarged by a whole factor to about this many pixels when they are shown."""
ANIMATIONS = (".gif", ".webp")


def to_bytes(images: Tensor) -> Tensor:
    """uint8 images on the CPU, 255 for 1; those that are uint8 stay as they are."""
    if images.dtype == torch.uint8:
        return images.cpu()
    return images.float().mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


def enlarged(images: Tensor) -> Tensor:
    """Small images with every pixel a square, so that they can be looked at: (…, H, W) -> (…, fH, fW)."""
    factor = max(1, VISIBLE // images.shape[-1])
    return images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def grid(images: Tensor, columns: int) -> Tensor:
    """(n, C, H, W) in rows of `columns`, enlarged where small: one RGB image (3, H', W') uint8."""
    picture: Tensor = make_grid(to_bytes(enlarged(images)), nrow=columns, padding=4, pad_value=128)
    return picture


def strip(frames: Tensor) -> Tensor:
    """(T, n, C, H, W): a row for each of the n images, its frames from left to right."""
    return grid(frames.transpose(0, 1).flatten(0, 1), columns=frames.shape[0])


def png(image: Tensor) -> bytes:
    """A uint8 image (C, H, W) as a PNG file."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: Path, image: Tensor) -> None:
    """Writes a uint8 image (C, H, W)."""
    with atomic_file(path) as file:
        file.write(png(image))


def save_animation(path: Path, frames: Tensor, *, milliseconds: int = 80) -> None:
    """Writes (T, n, C, H, W) as a GIF or WebP of grids that plays to the end and back, for ever."""
    if path.suffix not in ANIMATIONS:
        raise UserError(f"{path}: an animation is written as {' or '.join(ANIMATIONS)}")
    there = [to_pil_image(grid(frame, columns=math.ceil(math.sqrt(len(frame))))) for frame in frames]
    shown = [*there, *there[-2:0:-1]]
    buffer = io.BytesIO()
    shown[0].save(
        buffer,
        path.suffix.removeprefix(".").upper(),
        save_all=True,
        append_images=shown[1:],
        duration=milliseconds,
        loop=0,
        lossless=True,
    )
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
