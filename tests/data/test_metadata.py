"""Metadata that nobody uses never spoils good pixels; a damaged pixel is still found."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from stand_ins import file_bytes, noise, smooth

from nvae.data.decoding import BadImage, decode

from .test_depth import chunk

IMAGE = Image.fromarray(noise(8, 8, 3))
AFTER_HEADER = 8 + 25
"""Where a PNG's second chunk begins."""


def with_chunk(extra: bytes) -> bytes:
    data = file_bytes(IMAGE)
    return data[:AFTER_HEADER] + extra + data[AFTER_HEADER:]


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**21)),
        chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * 2**21)),
        chunk(b"tEXt", b"k\0v")[:-1] + b"?",
        chunk(b"tIME", b"1234567")[:-1] + b"?",
        chunk(b"eXIf", b"II*\0\x08\0\0\0\x09\0")[:-1] + b"?",
    ],
    ids=["a long text", "a long profile", "a text's checksum", "a time's checksum", "an EXIF's checksum"],
)
def test_a_png_keeps_its_pixels_whatever_stands_beside_them(extra: bytes) -> None:
    assert np.array_equal(np.asarray(decode(with_chunk(extra))), np.asarray(IMAGE))


def test_a_transparency_that_is_damaged_is_damage() -> None:
    with pytest.raises(BadImage, match="PNG"):
        decode(with_chunk(chunk(b"tRNS", bytes(6))[:-1] + b"?"))


def exif(entries: bytes, count: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


def jpeg_with(payload: bytes) -> bytes:
    data = file_bytes(smooth(8, 16), "JPEG", quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


ORIENTATION_6 = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(
    "payload",
    [
        b"Exif\0\0garbage-not-tiff",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0",
        exif(struct.pack("<HHII", 0x0112, 5, 1, 26), 1) + struct.pack("<II", 1, 0),
        exif(struct.pack("<HHI", 0x0112, 2, 4) + b"six\0", 1),
    ],
    ids=["garbage", "nothing", "cut off", "one over zero", "a word"],
)
def test_an_orientation_that_cannot_be_read_turns_nothing(payload: bytes) -> None:
    assert decode(jpeg_with(payload)).size == (16, 8)


@pytest.mark.parametrize(
    "beside",
    [
        struct.pack("<HHII", 0x011A, 5, 1, 10_000),
        struct.pack("<HHII", 0x010E, 2, 400, 5_000),
        struct.pack("<HHI", 0x8298, 2, 4) + b"\xe9\xe8\xff\0",
    ],
    ids=["a resolution out of reach", "a text out of reach", "a text in Latin-1"],
)
def test_a_good_orientation_counts_beside_bad_tags(beside: bytes) -> None:
    assert decode(jpeg_with(exif(ORIENTATION_6 + beside, 2))).size == (8, 16)
