"""Encoded images: examined before they are stored, decoded to RGB bytes of one size as they are read. Pillow is here.

    bytes --header--> format, size, pixels within limits --decode--> upright, on white, RGB --resize--> [size, size, 3]

A header may promise more pixels than memory holds (a decompression bomb), so size and pixels are looked at before
anything is decoded.
"""

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, WebPImagePlugin

from gpt4moe.errors import ConfigError, DataError

# Pillow warns of what may be a bomb, and refuses twice as much; here its warning is an error too.
warnings.simplefilter("error", Image.DecompressionBombWarning)

assert WebPImagePlugin  # Pillow would load all of its dozens of formats to find this one

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
"""Of files that are taken for images."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Pillow opens no others: it knows dozens, some of which start other programs (EPS)."""
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
"""Of 8 bits a channel or fewer."""
MOST_PIXELS = 89_478_485
"""Pillow's own limit, above which it warns of a bomb."""
_MOST_SIDE = 65_535
"""A JPEG's limit. To resize a line of 5,000,000 pixels takes 30 times the memory of its pixels."""
_EXAMINED_SIZE = 224
"""Of a side that an image is decoded to at most where it is only examined; any other fails or succeeds alike. A small
image keeps its size: to enlarge it takes four times as long as to decode it."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF's orientation -> what makes it upright."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an image may be. Raises: ConfigError for limits that mean nothing."""

    max_pixels: int = 50_000_000
    """Width times height: 150 MB once decoded."""
    max_bytes: int = 50_000_000
    """Of the file."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise ConfigError(f"--max-pixels is {self.max_pixels}.", f"It is from 1 to {MOST_PIXELS}, Pillow's limit.")
        if self.max_bytes < 1:
            raise ConfigError(f"--max-bytes is {self.max_bytes}.", "It is at least 1.")


def examine(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Decodes an image in full, as training will. Returns: width, height.

    Raises: DataError for one that is empty, no image, of another format or depth, animated, too large, or not whole.
        Its cause says why, without a name.
    """
    image = _opened(data, limits)
    width, height = image.size
    _pixels(image, min(_EXAMINED_SIZE, width, height))
    return width, height


def decode(data: bytes, size: int, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """[size, size, 3] RGB: turned as its EXIF says, on white where it is transparent, resized whole, without cropping.

    An EXIF that cannot be read turns nothing.

    Args:
        limits: None: it was examined before.
    Raises: DataError as examine.
    """
    return _pixels(_opened(data, limits or ImageLimits(max_pixels=MOST_PIXELS, max_bytes=len(data) + 1)), size)


def header_size(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Width, height; no pixel is decoded. Raises: DataError as examine, but for pixels that are not whole."""
    width, height = _opened(data, limits).size
    return width, height


def _pixels(image: Any, size: int) -> NDArray[np.uint8]:
    """What examine and decode share, so that an image that is stored can be trained on. Raises: DataError."""
    try:
        if image.format in ("JPEG", "MPO"):  # MPO: a JPEG of many a phone, with further pictures behind it
            # libjpeg decodes at 1/2, 1/4 or 1/8 of the size, never below what is asked for here: up to 8 times faster.
            image.draft("RGB", (2 * size, 2 * size))
        image.load()
        upright = _upright(image)
        if upright.has_transparency_data:
            whole = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", whole.size, (255, 255, 255, 255)), whole)
        return np.asarray(upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, ValueError, IndexError and more
        raise _broken(error) from error


def _upright(image: Any) -> Any:
    """`image` is loaded: a PNG may have its EXIF behind its pixels."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # parsers of broken EXIF raise as many kinds as decoders; the pixels are whole
        return image
    return image if turn is None else image.transpose(turn)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """[height, width, 3] RGB as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def is_image(path: str | Path) -> bool:
    """By its name."""
    return Path(path).suffix.lower() in SUFFIXES


def by_number(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _opened(data: bytes, limits: ImageLimits) -> Any:
    """The header is read, no pixel. Raises: DataError."""
    if not data:
        raise DataError("it is empty", "Give the image's file.")
    if len(data) > limits.max_bytes:
        raise DataError(f"it has {len(data):,} bytes, more than {limits.max_bytes:,}", "Raise --max-bytes.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"it is a decompression bomb: {error}", "Leave it out.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"it is no image of {', '.join(_FORMATS)}", "Convert it, or leave it out.") from error
    except Exception as error:  # as in _pixels
        raise _broken(error) from error
    width, height = image.size
    if not width or not height:
        raise DataError(f"it has {width} x {height} pixels", "Leave it out.")
    if max(width, height) > _MOST_SIDE:
        raise DataError(f"it has {width:,} x {height:,} pixels, a side of more than {_MOST_SIDE:,}", "Shrink it.")
    if width * height > limits.max_pixels:
        raise DataError(
            f"it has {width:,} x {height:,} pixels, more than {limits.max_pixels:,}",
            "Raise --max-pixels, or shrink it.",
        )
    if image.mode not in _MODES:
        raise DataError(f"its pixels are {image.mode}, not 8 bits a channel", "Convert it to 8 bits.")
    if image.format != "MPO" and _is_animated(image):
        raise DataError("it is animated", "Give its frames as a list of images.")
    return image


def _is_animated(image: Any) -> bool:
    """A GIF looks for its second frame now, behind the blocks of its first. Raises: DataError."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception as error:  # as in _pixels
        raise _broken(error) from error


def _broken(error: Exception) -> DataError:
    return DataError(f"it is not whole ({error or type(error).__name__})", "Copy or download it again.")
