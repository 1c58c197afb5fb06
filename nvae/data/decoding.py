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
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .depth import UnknownPixelsError, eight_bits
from .images import CENTRE, BadImagesError, Crop, Images
from .metadata import turn_of, without_metadata

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
KINDS = "PNG, JPEG, WebP, BMP, TIFF or GIF"
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for damaged files."""


STRIP = 16
"""Images whose longer side is more than this many times the shorter one are never resized as a whole for one square."""


class BadImage(Exception):  # noqa: N818 - a verdict on one file of many
    """An image that can't be used; its text is the reason, without the image's name."""


def decode(data: bytes) -> Image.Image:
    """The 8-bit image, grey ("L") or "RGB", of an image file, the first of several in it, turned upright.

    Metadata that can't be read does not matter; raises BadImage for pixels that can't.
    """
    if not data:
        raise BadImage("empty file")
    try:
        return _decoded(data)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise BadImage(f"more than {limit:,} pixels, a decompression bomb?") from error
    except UnknownPixelsError as error:
        raise BadImage(str(error)) from error
    except DAMAGE as error:
        plain = without_metadata(data)
        if plain is not None and len(plain) < len(data):
            return decode(plain)
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(f"not a {KINDS} image") from error
        raise BadImage(f"damaged or truncated ({error})") from error


def _decoded(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        plain = eight_bits(image, data)
        turn = turn_of(image)
    return plain if turn is None else plain.transpose(turn)


@dataclass(frozen=True)
class Shaping:
    """How an image becomes a square: cut to `box`, shorter side resized to `size`, the square cut out."""

    size: int
    channels: Literal[1, 3]
    enlarge: bool = False
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) pixels of the image to keep, before anything else."""

    def cut(self, image: Image.Image, crop: Crop = CENTRE) -> Image.Image:
        """The square that `crop` places in an image of any size, as `square(rectangle(image), crop)` gives it.

        Of a long strip only the square is resized, at a cost that does not grow with its length. Raises BadImage.
        """
        image = self._boxed(image)
        width, height = self._sides(image)
        if max(width, height) <= STRIP * self.size:
            return self.square(self._resized(image), crop)
        left, top = round(crop[1] * (width - self.size)), round(crop[0] * (height - self.size))
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + self.size) * across, (top + self.size) * down)
        return self._coloured(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))

    def rectangle(self, image: Image.Image) -> Image.Image:
        """The image with its shorter side `size` and the configured channels; raises BadImage if it is too small.

        Resized with a bilinear filter that widens as it shrinks (antialiased), as torchvision's Resize does.
        """
        image = self._boxed(image)
        width, height = self._sides(image)
        if width * height > max(Image.MAX_IMAGE_PIXELS or 0, STRIP * self.size**2):
            raise BadImage(f"{image.width}×{image.height} pixels, which become {width}×{height}: cut the strip first")
        return self._resized(image)

    def _boxed(self, image: Image.Image) -> Image.Image:
        """What `box` keeps of an image."""
        if self.box is None:
            return image
        if image.width < self.box[2] or image.height < self.box[3]:
            raise BadImage(f"{image.width}×{image.height} pixels, but the crop box is {self.box}")
        return image.crop(self.box)

    def _sides(self, image: Image.Image) -> tuple[int, int]:
        """Width and height once the shorter side is `size`; raises BadImage where it is smaller."""
        short = min(image.size)
        if short < self.size and not self.enlarge:
            raise BadImage(f"{image.width}×{image.height} pixels, smaller than size {self.size} (see data.enlarge)")
        return self.size * image.width // short, self.size * image.height // short

    def _resized(self, image: Image.Image) -> Image.Image:
        sides = self._sides(image)
        return self._coloured(image if image.size == sides else image.resize(sides, Image.Resampling.BILINEAR))

    def _coloured(self, image: Image.Image) -> Image.Image:
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
