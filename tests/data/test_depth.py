"""16 bits, transparent colours and odd layouts, against what their files say byte by byte."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_ins import file_bytes

from nvae.data.decoding import BadImage, decode
from nvae.data.depth import DoubtfulPixels

Array = np.ndarray[Any, Any]
WIDE: Array = np.random.RandomState(0).randint(0, 65536, (4, 5, 4)).astype(np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: bytes, width: int, height: int, depth: int, colours: int, extra: bytes = b"") -> bytes:
    """A PNG of rows that already begin with their filter's number."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def png16(values: Array, colours: int, extra: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(rows, values.shape[1], values.shape[0], 16, colours, extra)


def tiff(values: Array, photometric: int, order: str = "<") -> bytes:
    """An uncompressed TIFF of 16 bits."""
    height, width, channels = values.shape
    body = values.astype(f"{order}u2").tobytes()
    bits, start = 8 + 2 + 12 * 9 + 4, 8 + 2 + 12 * 9 + 4 + 2 * channels
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits if channels > 1 else 16), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, start), (277, 3, channels), (278, 4, height), (279, 4, len(body))]
    found = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, value in tags:
        count = channels if tag == 258 else 1
        short = kind == 3 and count == 1
        found += struct.pack(f"{order}HHI", tag, kind, count)
        found += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    return found + struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels) + body


def rounded(values: Array) -> Array:
    return np.rint(values / 257).astype(np.uint8)


def over_white(values: Array, alpha: Array) -> Array:
    share = alpha.astype(np.float64) / 65535
    return rounded(np.rint(values * share + 65535 * (1 - share)))


def pixels(data: bytes) -> Array:
    return np.asarray(decode(data))


def test_colours_of_16_bits_are_rounded() -> None:
    assert np.array_equal(pixels(png16(WIDE[..., :3], 2)), rounded(WIDE[..., :3]))


def test_colours_of_16_bits_with_alpha_lie_over_white() -> None:
    assert np.array_equal(pixels(png16(WIDE, 6)), over_white(WIDE[..., :3], WIDE[..., 3:]))


def test_grey_of_16_bits_with_alpha_stays_grey_over_white() -> None:
    assert np.array_equal(pixels(png16(WIDE[..., :2], 4)), over_white(WIDE[..., 0], WIDE[..., 1]))


def test_a_transparent_grey_of_16_bits_is_white_and_the_others_are_themselves() -> None:
    key = int(WIDE[0, 0, 0])
    expected = rounded(WIDE[..., 0])
    expected[0, 0] = 255
    assert np.array_equal(pixels(png16(WIDE[..., :1], 0, chunk(b"tRNS", struct.pack(">H", key)))), expected)


def test_a_transparent_colour_of_16_bits_is_white() -> None:
    extra = chunk(b"tRNS", struct.pack(">HHH", *WIDE[0, 0, :3].tolist()))
    expected = rounded(WIDE[..., :3])
    expected[0, 0] = 255
    assert np.array_equal(pixels(png16(WIDE[..., :3], 2, extra)), expected)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_grey_is_named_in_the_depth_of_its_file(depth: int) -> None:
    values = np.arange(8) % 2**depth
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    expected = values * 255 // (2**depth - 1)
    expected[values == 1] = 255
    assert pixels(png(row, 8, 1, depth, 0, chunk(b"tRNS", b"\0\1"))).tolist() == [expected.tolist()]


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bit_colours_is_rounded(order: str) -> None:
    assert np.array_equal(pixels(tiff(WIDE[..., :3], 2, order)), rounded(WIDE[..., :3]))


def test_grey_whose_zero_is_white_is_turned_round() -> None:
    assert np.array_equal(pixels(tiff(WIDE[..., :1], 0)), rounded(65535 - WIDE[..., 0]))


def test_twelve_bits_in_sixteen_are_doubted() -> None:
    with pytest.warns(DoubtfulPixels, match="no value above 4095"):
        decode(png16(WIDE[..., :1] >> 4, 0))


def test_black_is_not_doubted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(png16(np.zeros((2, 2, 1)), 0)).max() == 0


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_that_pillow_knows_are_read(kind: str) -> None:
    image = Image.fromarray((WIDE[..., 0] >> 8).astype(np.uint8))
    assert np.array_equal(np.asarray(decode(file_bytes(image, kind)).convert("L")), np.asarray(image))


def test_of_a_moving_picture_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(moving)[0, 0].tolist() == [255, 0, 0]


def test_floats_are_refused_by_their_kind() -> None:
    with pytest.raises(BadImage, match="pixels of the kind F"):
        decode(file_bytes(Image.new("F", (4, 4)), "TIFF"))


def test_signed_numbers_are_refused() -> None:
    signed = file_bytes(Image.fromarray(np.zeros((4, 4), dtype=np.uint8)), "TIFF", tiffinfo={339: 2})
    with pytest.raises(BadImage, match="signed numbers"):
        decode(signed)
