"""What image files hold beside pixels: how they are to be turned is used, and nothing else may spoil them."""

import struct
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

Transpose = Image.Transpose
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes the image upright."""
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
PNG_KEPT = (b"tRNS", b"eXIf")
JPEG_KEPT = (0xE0, 0xEE)
"""JFIF and Adobe, which says how colours are coded."""


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright by its EXIF tag; None where it is so, or where the tag can't be read."""
    try:
        return TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # a damaged tag raises whatever its reading runs into
        return None


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file without what does not decide its pixels or its orientation; None for other files."""
    if data.startswith(PNG):
        return PNG + b"".join(_png_chunks(data))
    if data.startswith(JPEG):
        return JPEG + b"".join(_jpeg_segments(data))
    return None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The chunks that matter: critical ones, transparency, EXIF where it is whole."""
    place = len(PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        chunk = data[place : place + 12 + length]
        place += len(chunk)
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if not kind[0] & 0x20 or kind == b"tRNS" or (kind in PNG_KEPT and is_whole):
            yield chunk


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """The segments that matter, and all that follows the first scan's header."""
    place = len(JPEG)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xDA:
            break
        segment = data[place : place + 2 + length]
        is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_application or marker in JPEG_KEPT or segment[4:10] == b"Exif\0\0":
            yield segment
        place += 2 + length
    yield data[place:]
