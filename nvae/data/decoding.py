"""From an image file to pixels: what is accepted, and how it becomes a square of the configured size.

Shapes: C channels, H W pixels.
"""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


class BadImage(Exception):  # noqa: N818 - a verdict on a file, reported with others
    """An image that can't be used; its text is the reason, without the image's name."""


def decode(data: bytes) -> Image.Image:
    """The 8-bit image, grey ("L") or "RGB", of a PNG, JPEG or WebP file, turned upright. Raises BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
            return eight_bits(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise BadImage(f"more than {limit:,} pixels, a decompression bomb?") from error
    except UnidentifiedImageError as error:
        raise BadImage("not a PNG, JPEG or WebP image") from error
    except _DAMAGE as error:
        raise BadImage(f"damaged or truncated ({error})") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """The image as "L" or "RGB": palettes resolved, transparency blended over white, 16-bit grey rounded to 8."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        blended = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return blended.convert("L") if image.mode in ("L", "LA", "La") else blended
    if image.mode in ("L", "RGB"):
        return image.copy()
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "P":
        return image.convert("RGB")
    if image.mode.startswith("I"):
        return _sixteen_to_eight(image)
    if image.mode == "CMYK":
        raise BadImage("CMYK, colours of a printer: convert it to RGB with its colour profile")
    raise BadImage(f"pixels of the kind {image.mode}; RGB, grey, palette, alpha and 16-bit grey are read")


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadImage(f"grey values from {grey.min()} to {grey.max()}; 8 and 16 bits are read")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


@dataclass(frozen=True)
class Shaping:
    """How an image becomes (C, size, size): cut to `box`, shorter side resized to `size`, the square cut out."""

    size: int
    channels: Literal[1, 3]
    enlarge: bool = False
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) pixels of the image to keep."""

    def rectangle(self, image: Image.Image) -> Image.Image:
        """The image with its shorter side `size` and the configured channels; raises BadImage if it is too small.

        Resized with a bilinear filter that widens as it shrinks (antialiased), as torchvision's Resize does.
        """
        if self.box is not None:
            if image.width < self.box[2] or image.height < self.box[3]:
                raise BadImage(f"{image.width}×{image.height} pixels; the crop box {self.box} lies outside it")
            image = image.crop(self.box)
        short = min(image.size)
        if short < self.size and not self.enlarge:
            raise BadImage(
                f"{image.width}×{image.height} pixels, smaller than size {self.size} (data.enlarge=true takes it)"
            )
        if short != self.size:
            width, height = (self.size * side // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return image.convert("L" if self.channels == 1 else "RGB")

    def square(self, rectangle: Image.Image, crop: tuple[float, float] = (0.5, 0.5)) -> Tensor:
        """The square (C, size, size) uint8 of a rectangle, `crop` (down, across) in [0, 1] of the room there is."""
        top = round(crop[0] * (rectangle.height - self.size))
        left = round(crop[1] * (rectangle.width - self.size))
        square = rectangle.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(square))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)
