"""Encoded images are refused before they can do harm, and decoded upright, on white, to one size."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from gpt4moe.data.pictures import ImageLimits, decode, encode_png, examine
from gpt4moe.errors import ConfigError, DataError

LIMITS = ImageLimits()


def file_of(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than it has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3 * width)))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it is empty"), (b"GIF89a", "no image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image"),
        (bomb(0, 5), "no image|0 x 5|not whole"), (bomb(60_000, 60_000), "decompression bomb"),
        (bomb(10_000, 9_000), "decompression bomb|9,000 pixels"), (bomb(9_000, 9_000), "9,000 x 9,000"),
        (bomb(50, 50), "not whole"), (file_of(Image.new("I;16", (4, 4))), "not 8 bits"),
        (file_of(Image.new("RGB", (4, 4)), "JPEG")[:-100], "not whole"), 
        (file_of(Image.new("L", (4, 4)), "TIFF"), "no image"),
        (file_of(Image.new("L", (70_000, 1))), "70,000 x 1 pixels, a side of more than 65,535"),
    ],
)  # fmt: skip
def test_what_is_no_whole_image_within_limits_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        examine(data, LIMITS)


def test_files_that_are_too_large_and_limits_that_mean_nothing_are_refused() -> None:
    with pytest.raises(DataError, match=r"more than 10"):
        examine(file_of(Image.new("RGB", (4, 4))), ImageLimits(max_bytes=10))
    with pytest.raises(ConfigError, match="--max-pixels is 0"):
        ImageLimits(max_pixels=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_of_the_size(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = file_of(Image.new("RGB", (20, 10), (255, 255, 255)).convert(mode), kind)
    assert examine(data, LIMITS) == (20, 10)
    pixels = decode(data, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and (pixels >= 250).all()


def test_what_is_transparent_is_white() -> None:
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 4))
    pixels = decode(file_of(picture), 8)
    assert (pixels[:4] == 255).all() and (pixels[4:] == (200, 0, 0)).all()


def test_a_photo_is_turned_as_its_exif_says_and_squeezed_whole() -> None:
    picture = Image.new("RGB", (64, 32), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: what was left is above
    pixels = decode(file_of(picture, "JPEG", exif=exif, quality=95), 16).astype(int)
    assert pixels[:7].min() > 240 and pixels[9:].max() < 15


def test_a_large_photo_decodes_to_what_the_whole_one_would_look_like() -> None:
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8)[:, None, None], (1, 512, 3))
    pixels = decode(file_of(Image.fromarray(ramp), "JPEG", quality=95), 32).astype(int)
    assert abs(pixels[:, :, 0].mean(axis=1) - np.linspace(4, 251, 32)).max() < 4


def test_pixels_that_are_encoded_here_come_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode_png(pixels), 8), pixels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_exif_that_cannot_be_read_turns_nothing(kind: str) -> None:
    picture = Image.new("RGB", (20, 10), (255, 255, 255))
    data = file_of(picture, kind, exif=b"Exif\0\0NO TIFF HEADER HERE")
    assert examine(data, LIMITS) == (20, 10)
    assert (decode(data, 8) >= 250).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(pixels), "PNG", exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, 8), np.asarray(want))


def test_a_damaged_gif_of_two_frames_is_refused_as_any_damaged_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 24, 32), dtype=np.uint8)
    first, second = map(Image.fromarray, noise)
    whole = file_of(first, "GIF", save_all=True, append_images=[second])
    with pytest.raises(DataError, match="animated"):
        examine(whole, LIMITS)
    border = len(file_of(first, "GIF"))  # about where the second frame begins
    cut = [whole[:length] for length in (*range(1, 60), *range(border - 60, border + 60), len(whole) - 1)]
    flipped = [
        whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in (*range(60), *range(border, border + 60))
    ]
    told: set[str] = set()
    for data in (*cut, *flipped):
        try:
            examine(data, LIMITS)
        except DataError as error:
            told.add(error.cause.partition("(")[0])
    assert "it is not whole " in told and "it is animated" in told
