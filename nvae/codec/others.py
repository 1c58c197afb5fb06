"""What other lossless formats need for the same images, for comparison.

Shapes: N images, C colours, H W pixels.
"""

import gzip
import importlib
import math
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from PIL import Image

Encoder = Callable[[np.ndarray], bytes]
"""Of the levels (C, H, W) uint8 of an image, 0 or 1 where it is binary."""


def encoders(levels: int) -> dict[str, Encoder]:
    """Those that this machine has, for images of levels 0 to `levels`; each at its smallest."""
    binary = levels == 1
    found: dict[str, Encoder] = {
        "PNG": lambda x: _saved(_image(x, binary), "PNG", optimize=True),
        "WebP": lambda x: _saved(_image(x, binary).convert("RGB"), "WEBP", lossless=True, quality=100, method=6),
        "gzip": lambda x: gzip.compress(np.packbits(x).tobytes() if binary else x.tobytes(), 9),
    }
    try:
        jpegxl_encode = importlib.import_module("imagecodecs").jpegxl_encode
    except (ImportError, AttributeError):
        return found
    return found | {
        "JPEG XL": lambda x: bytes(
            jpegxl_encode(np.asarray(_image(x, binary).convert(_mode(x))), effort=9, lossless=True)
        )
    }


def bits_each(encode: Encoder, images: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) bits of each image in a file of its own."""
    return np.array([8 * len(encode(image)) for image in images])


def bits_in_one(encode: Encoder, images: Sequence[np.ndarray]) -> int:
    """Bits of all images, of one size, as one picture: then what a file begins with is paid once."""
    return 8 * len(encode(sheet(images)))


def sheet(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (C, H, W) of one size beside and below each other, black where there are no more."""
    columns = math.isqrt(len(images) - 1) + 1
    rows = -(-len(images) // columns)
    filled = [*images, *[np.zeros_like(images[0])] * (rows * columns - len(images))]
    colours, height, width = images[0].shape
    whole = np.stack(filled).reshape(rows, columns, colours, height, width).transpose(2, 0, 3, 1, 4)
    return whole.reshape(colours, rows * height, columns * width)


def _image(x: np.ndarray, binary: bool) -> Image.Image:
    if binary:
        return Image.fromarray(x[0] * np.uint8(255)).convert("1")
    return Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(np.moveaxis(x, 0, -1)))


def _mode(x: np.ndarray) -> str:
    return "L" if len(x) == 1 else "RGB"


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
