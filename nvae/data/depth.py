"""Pixels of any depth and with any transparency as 8 bits over white.

Shapes: H W pixels, C colours (1 or 3).
"""

import sys
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
TOP = 65535
DARK = 4095
"""16-bit values that never exceed this are of 12 bits, if not of a dark picture."""
DOUBT = (
    f"a 16-bit image has no value above {DARK}, and comes out nearly black: if it is of 12 bits or fewer, scale it to "
    f"0 … {TOP} first"
)
OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
SAMPLE_FORMAT, SIGNED = 339, 2
"""Tags and values of TIFF."""


class DoubtfulPixels(UserWarning):
    """Pixels that were read, and may not be what was meant."""


class UnknownPixelsError(ValueError):
    """Pixels of a kind that has no meaning here; the text says which."""


def eight_bits(image: ImageFile, data: bytes) -> Image.Image:
    """An image, opened and not yet loaded, as "L" or "RGB" of 8 bits; palettes resolved, transparency over white.

    `data` is its file: Pillow drops the lower half of 16-bit colours, which is read again. Raises UnknownPixelsError.
    """
    modes = [_raw_mode(tile) for tile in image.tile]
    if SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        raise UnknownPixelsError("signed numbers, of which Pillow would make other greys; from 0 up is read")
    image.load()
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image)
    if any(_is_deep(mode) for mode in modes):
        return _sixteen_to_eight(_sixteen_bit_colours(data), image.info.get("transparency"))
    if image.mode in ("L", "RGB", "1") and "transparency" in image.info:
        return _with_transparent_colour(image, image.info["transparency"], data)
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        blended = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return blended.convert("L") if image.mode in ("LA", "La") else blended
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "P", "YCbCr"):
        return image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "CMYK":
        raise UnknownPixelsError("CMYK, colours of a printer: convert it to RGB with its colour profile")
    raise UnknownPixelsError(f"pixels of the kind {image.mode}; RGB, grey, palette and alpha are read, of 8 or 16 bits")


def _with_transparent_colour(image: Image.Image, colour: Any, data: bytes) -> Image.Image:
    """The image with one colour made white. A PNG of 1, 2 or 4 bits names it as its file does, before scaling."""
    pixels = np.array(image.convert("L") if image.mode == "1" else image)
    if image.format == "PNG" and pixels.ndim == 2 and data[24] < 8:
        colour = colour * 255 // (2 ** data[24] - 1)
    hit = pixels == np.asarray(colour)
    pixels[hit if pixels.ndim == 2 else hit.all(-1)] = 255
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------------------ 16 bits


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    """Grey values v of 16 bits as round(v / 257): 0 stays 0 and 65535 becomes 255; of 12 bits as round(v / 16.06)."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > TOP:
        raise UnknownPixelsError(f"grey values from {grey.min()} to {grey.max()}; 8 and 16 bits are read")
    grey, tags = grey.astype(np.uint16), getattr(image, "tag_v2", {})
    if tags.get(BITS_PER_SAMPLE) == (12,):
        grey = ((grey.astype(np.uint32) * TOP + 2047) // 4095).astype(np.uint16)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = TOP - grey
    return _sixteen_to_eight(grey[..., None], image.info.get("transparency"))


def _sixteen_bit_colours(data: bytes) -> np.ndarray:
    """(H, W, C or C + alpha) uint16 of a file whose colours have 16 bits. Raises UnknownPixelsError for odd layouts.

    Pillow keeps the first byte of each pair, and with the order of bytes exchanged the second.
    """
    with Image.open(BytesIO(data)) as image:
        if [_raw_mode(tile) for tile in image.tile] == ["LA;16B"]:  # 32 bits, as an RGBA pixel has them
            image.tile = [_with_mode(image.tile[0], "RGBA")]
            pairs = np.asarray(image).astype(np.uint16)
            return pairs[..., ::2] << 8 | pairs[..., 1::2]
        high = np.asarray(image).astype(np.uint16)
        if image.mode not in ("RGB", "RGBA"):
            raise UnknownPixelsError(f"16-bit pixels of the kind {image.mode}; grey, RGB and alpha are read")
    with Image.open(BytesIO(data)) as image:
        image.tile = [_with_mode(tile, _exchanged(_raw_mode(tile))) for tile in image.tile]
        values: np.ndarray = high << 8 | np.asarray(image)
    return values


def _raw_mode(tile: Any) -> str:
    """How a part of a file is coded, as "RGB;16B"."""
    return str(tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0])


def _is_deep(mode: str) -> bool:
    return mode.partition(";")[2] in OTHER_ORDER


def _with_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))


def _exchanged(mode: str) -> str:
    colours, _, order = mode.partition(";")
    return f"{colours};{OTHER_ORDER[order]}"


def _sixteen_to_eight(values: np.ndarray, transparent: Any = None) -> Image.Image:
    """(H, W, C or C + alpha) uint16 over white, rounded to 8 bits; the colour `transparent` is white."""
    if 0 < values.max() <= DARK:
        warnings.warn(DOUBT, DoubtfulPixels, stacklevel=2)
    colours, alpha = (values[..., :-1], values[..., -1:]) if values.shape[-1] in (2, 4) else (values, None)
    if alpha is not None:
        opaque = alpha.astype(np.uint64)
        colours = ((colours * opaque + TOP * (TOP - opaque) + TOP // 2) // TOP).astype(np.uint16)
    eight = ((colours.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparent, int | tuple):
        eight[(values == np.asarray(transparent)).all(-1)] = 255
    return Image.fromarray(eight[..., 0] if eight.shape[-1] == 1 else eight)
