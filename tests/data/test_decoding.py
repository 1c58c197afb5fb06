"""What image files become, and the reason given for each that can't be used."""

from collections.abc import Callable

import numpy as np
import pytest
import torchvision.transforms.v2 as transforms
from PIL import Image
from stand_ins import file_bytes, noise, smooth

from nvae.data import decoding
from nvae.data.decoding import BadImage, Shaping, decode


def through(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    return decode(file_bytes(image, kind, **options))


def test_an_rgb_png_keeps_its_pixels() -> None:
    array = noise(5, 7, 3)
    assert np.array_equal(np.asarray(through(Image.fromarray(array))), array)


def test_a_grey_png_keeps_its_pixels() -> None:
    array = noise(5, 7)
    assert np.array_equal(np.asarray(through(Image.fromarray(array))), array)


def test_a_plain_jpeg_keeps_its_colour() -> None:
    assert through(Image.new("RGB", (16, 16), (77, 77, 77)), "JPEG").getpixel((3, 3)) == (77, 77, 77)


def test_a_lossless_webp_keeps_its_pixels() -> None:
    array = noise(5, 7, 3)
    assert np.array_equal(np.asarray(through(Image.fromarray(array), "WEBP", lossless=True)), array)


def test_a_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert np.asarray(through(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparency_is_blended_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    assert np.asarray(through(image)).tolist() == [[[255] * 3, [10, 20, 30], [204] * 3]]


def test_a_transparent_palette_entry_is_blended_over_white() -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    assert np.asarray(through(image, transparency=0)).tolist() == [[[255, 255, 255]]]


def test_grey_with_alpha_stays_grey() -> None:
    image = through(Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 255)]))
    assert (image.mode, image.getpixel((0, 0))) == ("L", 100)


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(through(image)).tolist() == [[0, 255]]


def test_sixteen_bit_grey_is_rounded_to_eight() -> None:
    values = np.array([[0, 128, 129, 257 * 77, 65535]], dtype=np.uint16)
    assert np.asarray(through(Image.fromarray(values))).tolist() == [[0, 0, 1, 77, 255]]


def test_an_image_that_lies_on_its_side_is_turned_upright() -> None:
    image = smooth(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = through(image, exif=exif)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def bomb() -> bytes:
    """A PNG of a few kB that says it has 20 000 × 20 000 pixels."""
    image = Image.new("1", (20_000, 20_000))
    return file_bytes(image)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "empty file"),
    "text": (lambda: b"hello, I am a picture\n" * 9, "not a PNG, JPEG, WebP, BMP, TIFF or GIF image"),
    "a truncated JPEG": (lambda: file_bytes(smooth(64, 64), "JPEG")[:600], "truncated"),
    "a truncated PNG": (lambda: file_bytes(Image.fromarray(noise(64, 64, 3)))[:5000], "truncated"),
    "a truncated WebP": (lambda: file_bytes(Image.fromarray(noise(64, 64, 3)), "WEBP", lossless=True)[:5000], ""),
    "a bomb": (bomb, "more than 178,956,970 pixels"),
    "CMYK": (lambda: file_bytes(Image.new("CMYK", (8, 8)), "JPEG"), "CMYK"),
    "a PCX": (lambda: file_bytes(Image.new("P", (8, 8)), "PCX"), "not a PNG, JPEG, WebP, BMP, TIFF or GIF image"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_has_a_reason_of_one_line(make: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(make())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_of_a_png_is_found() -> None:
    data = bytearray(file_bytes(Image.fromarray(noise(64, 64, 3))))
    data[6000] ^= 1
    with pytest.raises(BadImage, match="damaged"):
        decode(bytes(data))


# ------------------------------------------------------------------------------------------------------------ shaping


def shaped(image: Image.Image, shaping: Shaping) -> np.ndarray:
    return np.atleast_3d(np.asarray(shaping.square(shaping.rectangle(image)))).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (71, 100)])
def test_shaping_is_torchvisions_resize_and_centre_crop(height: int, width: int) -> None:
    image = smooth(height, width)
    reference = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.PILToTensor()])(image)
    assert np.array_equal(shaped(image, Shaping(32, 3)), reference.numpy())


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    array = noise(32, 32, 3)
    assert np.array_equal(shaped(Image.fromarray(array), Shaping(32, 3)), array.transpose(2, 0, 1))


def test_shrinking_is_antialiased() -> None:
    """A fine checkerboard shrinks to grey; nearest-neighbour or plain bilinear sampling would keep black and white."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    inside = shaped(board, Shaping(8, 1))[0, 1:-1, 1:-1]
    assert abs(inside.astype(int) - 127).max() <= 2


def test_celeba_is_cut_to_the_box_of_the_spec() -> None:
    """Spec §8: left 15, top 40, right 163, bottom 188, then resized to 64."""
    image = smooth(218, 178)
    reference = np.asarray(image.crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(shaped(image, Shaping(64, 3, box=(15, 40, 163, 188))), reference.transpose(2, 0, 1))


def test_a_box_outside_the_image_is_refused() -> None:
    with pytest.raises(BadImage, match="64×64 pixels, but the crop box"):
        shaped(smooth(64, 64), Shaping(64, 3, box=(15, 40, 163, 188)))


def test_grey_becomes_three_equal_channels() -> None:
    array = noise(8, 8)
    assert np.array_equal(shaped(Image.fromarray(array), Shaping(8, 3)), np.stack([array] * 3))


def test_a_one_pixel_image_is_not_blown_up() -> None:
    with pytest.raises(BadImage, match="1×1 pixels, smaller than size 32"):
        shaped(Image.new("RGB", (1, 1)), Shaping(32, 3))


def test_small_images_are_enlarged_on_request() -> None:
    assert shaped(Image.new("RGB", (1, 1), (1, 2, 3)), Shaping(4, 3, enlarge=True)).shape == (3, 4, 4)


@pytest.mark.parametrize(("crop", "left"), [((0.5, 0.0), 0), ((0.5, 1.0), 12), ((0.5, 0.5), 6)])
def test_a_crop_places_the_square(crop: tuple[float, float], left: int) -> None:
    image = smooth(8, 20)
    square = Shaping(8, 3).square(image, crop)
    assert np.array_equal(np.asarray(square), np.asarray(image)[:, left : left + 8])


@pytest.mark.parametrize("size", [(40, 400), (400, 40), (1, 900)], ids=["tall", "wide", "a pixel wide"])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_of_a_strip_the_square_is_what_resizing_it_whole_gives(
    size: tuple[int, int], crop: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, shaping = smooth(*size), Shaping(16, 3, enlarge=True)
    whole = np.asarray(shaping.square(shaping.rectangle(image), crop)).astype(int)
    monkeypatch.setattr(decoding, "STRIP", 2)
    assert np.abs(np.asarray(shaping.cut(image, crop)).astype(int) - whole).max() <= 1


def test_a_strip_costs_what_is_kept_of_it() -> None:
    """As a whole it would become 256 × 15 360 000 pixels, 12 GB."""
    strip = Image.new("RGB", (1, 60_000), (1, 2, 3))
    assert Shaping(256, 3, enlarge=True).cut(strip).getpixel((100, 100)) == (1, 2, 3)


def test_a_strip_that_would_be_kept_whole_is_refused() -> None:
    with pytest.raises(BadImage, match="1×60000 pixels, which become 256×15360000: cut the strip first"):
        Shaping(256, 3, enlarge=True).rectangle(Image.new("RGB", (1, 60_000)))
