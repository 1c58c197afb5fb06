"""From an image file to pixels: what is accepted, and how it becomes a square of the configured size.

Shapes: C channels, H W pixels.
"""

import struct
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .images import CENTRE, BadImagesError, Crop, Images

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
"""What Pillow raises for damaged files."""


class BadImage(Exception):  # noqa: N818 - a verdict on one file of many
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
    except DAMAGE as error:
        raise BadImage(f"damaged or truncated ({error})") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """The image as "L" or "RGB": palettes resolved, transparency blended over white, 16-bit grey rounded to 8."""
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        blended = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return blended.convert("L") if image.mode in ("1", "L", "LA", "La") else blended
    if image.mode in ("L", "RGB"):
        return image
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
    """Grey values v of 16 bits as round(v / 257): 0 stays 0 and 65535 becomes 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadImage(f"grey values from {grey.min()} to {grey.max()}; 8 and 16 bits are read")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


@dataclass(frozen=True)
class Shaping:
    """How an image becomes a square: cut to `box`, shorter side resized to `size`, the square cut out."""

    size: int
    channels: Literal[1, 3]
    enlarge: bool = False
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) pixels of the image to keep, before anything else."""

    def rectangle(self, image: Image.Image) -> Image.Image:
        """The image with its shorter side `size` and the configured channels; raises BadImage if it is too small.

        Resized with a bilinear filter that widens as it shrinks (antialiased), as torchvision's Resize does.
        """
        if self.box is not None:
            if image.width < self.box[2] or image.height < self.box[3]:
                raise BadImage(f"{image.width}×{image.height} pixels, but the crop box is {self.box}")
            image = image.crop(self.box)
        short = min(image.size)
        if short < self.size and not self.enlarge:
            raise BadImage(f"{image.width}×{image.height} pixels, smaller than size {self.size} (see data.enlarge)")
        if short != self.size:
            width, height = (self.size * side // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        mode = "L" if self.channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def square(self, rectangle: Image.Image, crop: Crop = CENTRE) -> Image.Image:
        """The square `size` × `size` that `crop` places in a rectangle."""
        if rectangle.size == (self.size, self.size):
            return rectangle
        top = round(crop[0] * (rectangle.height - self.size))
        left = round(crop[1] * (rectangle.width - self.size))
        return rectangle.crop((left, top, left + self.size, top + self.size))


class Decoded(Images):
    """Images that are decoded as they are read."""

    @abstractmethod
    def square(self, index: int, crop: Crop) -> Image.Image:
        """The image at `index`, "L" or "RGB" as `shape` says, cut out at `crop`. Raises BadImage."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the image at `index` is called in messages."""

    def read_into(self, out: Tensor, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> None:
        problems = []
        for row, index, crop in zip(out.numpy(), indices, crops or [CENTRE] * len(indices), strict=True):
            try:
                row[...] = np.asarray(self.square(index, crop)).reshape(row.shape)  # (H, W) of a grey one -> (H, W, 1)
            except BadImage as error:
                problems.append(f"{self.name(index)}: {error}")
        if problems:
            raise BadImagesError(problems)
