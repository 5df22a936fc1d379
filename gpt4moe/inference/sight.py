"""Prompts with images, read and checked before a model is loaded. No torch.

    "What is <image>?", ["cat.png"] --> tokens with an image token at each tag, and a Picture for each of them
    ["f0.png", "f1.png"], or a folder of frames       a clip, at one tag

Texts are cut at their tags and encoded as documents with images are for training (data.image_tokens), images decoded
and resized as there (data.pictures). A file is decoded here, to be refused in time, and again when its text joins: no
list of prompts fills the memory with pixels.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpt4moe.architecture.encoder_folder import require_encoder, require_same_encoder
from gpt4moe.config.run import RunConfig
from gpt4moe.config.vision import EncoderKind, VisionConfig
from gpt4moe.data.image_tokens import IMAGE_TOKEN, split_tags
from gpt4moe.data.pictures import ImageLimits, by_number, decode, header_size, is_image
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.pictures import Picture, Pixels, digest_of, picture
from gpt4moe.inference.text import Words

T = TypeVar("T")
FILE_LIMITS = ImageLimits()
SENT_LIMITS = ImageLimits(max_pixels=20_000_000)
"""Of an image that a client sends. To decode it takes up to 320 MB (with transparency) and half a second."""
SENT_PIXELS = 40_000_000
"""Of all images of a request together: a PNG of one colour has a byte for 250 pixels, so a body may hold any number."""
_CURE = "Give whole files of JPEG, PNG, WebP, GIF or BMP, {:,} pixels and {:,} bytes at most each."


@dataclass(frozen=True, slots=True)
class Clip:
    """The files of an image, which has one frame, or of a clip."""

    frames: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.frames[0]) if len(self.frames) == 1 else f"{self.frames[0]} and {len(self.frames) - 1} more"


@dataclass(frozen=True, slots=True)
class Sight:
    """How prompts of one model are read. `vision` is None: a text model, in whose texts no tag means an image."""

    words: Words
    vision: VisionConfig | None
    token: str
    image_id: int | None
    """None: the tokenizer has no such token, and images are refused."""

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that are never drawn."""
        return frozenset() if self.vision is None or self.image_id is None else frozenset({self.image_id})

    @property
    def reads_images(self) -> bool:
        return bool(self.banned)

    def num_tags(self, text: str) -> int:
        """Places of images in a text."""
        return text.count(self.token) if self.reads_images else 0

    def require(self, what: str) -> None:
        """Raises: ConfigError where the model reads no images; `what` has some."""
        if self.vision is None:
            raise ConfigError(
                f"{what} has images, but the folder has a text model.",
                "Leave the images out, or name a run of stage=vision (its run or step folder, no export).",
            )
        if self.image_id is None:
            raise ConfigError(
                f"{what} has images, but the tokenizer has no special token {self.token}, within model.vocab_size="
                f"{self.words.vocab_size}, to stand for one.",
                "Name the one that the data was made with: --image-token.",
            )

    def encode(self, text: str, images: int, *, is_chat: bool, what: str) -> list[int]:
        """Tokens of a prompt, an image token for each tag. Raises: ConfigError, as require_tags and Words.encode."""
        self.require_tags(text, images, is_chat=is_chat, what=what)
        if not images:
            return self.words.encode(text, is_chat=is_chat, what=what)
        assert self.image_id is not None
        return self.words.encode_parts(split_tags(text, self.token), self.image_id, is_chat=is_chat, what=what)

    def require_tags(self, text: str, images: int, *, is_chat: bool, what: str) -> None:
        """
        Args:
            images: that were given for the prompt.
            what: names it in errors.
        Raises: ConfigError for another number of images than tags, and for any where the model reads none.
        """
        if images:
            self.require(what)
        tags = self.num_tags(text)
        if tags != images:
            where = "its rendered chat" if is_chat else "it"
            raise ConfigError(
                f"{what} has {images} {_plural('image', images)}, but {where} has {tags} "
                f"{_plural(f'{self.token} tag', tags)}.",
                f"Write {self.token} once for each image or clip, where it stands"
                f"{', and use a chat template that shows contents as they are' * is_chat}.",
            )

    def pictures(self, tokens: Sequence[int], clips: Sequence[Clip]) -> tuple[Picture, ...]:
        """Of a prompt that `encode` made. Raises: DataError for a file that is no image, is damaged or too large."""
        places = [place for place, token in enumerate(tokens) if token == self.image_id] if clips else []
        assert self.vision is not None or not clips
        made = []
        for place, clip in zip(places, clips, strict=True):
            digest = digest_of(self._pixels(clip))
            made.append(Picture(place, digest, partial(self._again, clip, digest)))
        return tuple(made)

    def sent(self, tokens: Sequence[int], images: Sequence[bytes]) -> tuple[Picture, ...]:
        """As pictures, of files' bytes, each one image; the pixels are kept. No image is decoded where their headers
        promise more than SENT_PIXELS together. Raises: DataError, as pictures."""
        total = sum(width * height for width, height in (
            _named(f"Image {number}", partial(header_size, data, SENT_LIMITS), SENT_LIMITS)
            for number, data in enumerate(images, start=1)
        ))  # fmt: skip
        if total > SENT_PIXELS:
            raise DataError(
                f"The {len(images)} images have {total:,} pixels, more than {SENT_PIXELS:,} together.",
                f"Send fewer or smaller ones: the model sees each at {self._size} x {self._size} pixels.",
            )
        places = [place for place, token in enumerate(tokens) if token == self.image_id] if images else []
        decoded = [_decoded(f"Image {number}", data, self._size, SENT_LIMITS)[None]
                   for number, data in enumerate(images, start=1)]  # fmt: skip
        return tuple(picture(pixels, place) for place, pixels in zip(places, decoded, strict=True))

    def _pixels(self, clip: Clip) -> Pixels:
        assert self.vision is not None
        most = self.vision.resampler.max_frames
        if len(clip.frames) > most:
            raise ConfigError(
                f"The clip of {clip} has {len(clip.frames)} frames, but model.vision.resampler.max_frames is {most}.",
                f"Give {most} or fewer, one a second say.",
            )
        return np.stack([_decoded(str(path), _bytes(path), self._size, FILE_LIMITS) for path in clip.frames])

    def _again(self, clip: Clip, digest: str) -> Pixels:
        pixels = self._pixels(clip)
        if digest_of(pixels) != digest:
            raise DataError(f"{clip} has changed since this command began.", "Give the same command again.")
        return pixels

    @property
    def _size(self) -> int:
        assert self.vision is not None
        return self.vision.encoder.image_size


def sight_of(run: RunConfig, words: Words, token: str | None) -> Sight:
    """Args: token: that stands for an image; None: <image>. Raises: ConfigError for a named token that is none."""
    name = token or IMAGE_TOKEN
    added = words.backend.get_added_tokens_decoder().items()
    number = next((int(number) for number, one in added if one.content == name and one.special), None)
    if number is not None and (number in words.end_ids or number >= words.vocab_size):
        number = None
    if token is not None and number is None:
        raise ConfigError(
            f"--image-token {token}: the tokenizer has no such special token that could stand for an image.",
            "Name the one that the data was made with.",
        )
    return Sight(words, run.model.vision, name, number)


def with_encoder(run: RunConfig, folder: Path | None, known: dict[str, Any] | None) -> RunConfig:
    """The run with its encoder in `folder`, where it has moved; checked. Call it where prompts have images.

    Args:
        known: Opened.encoder.
    Raises: ConfigError for a folder that lacks weights, of another kind or size than the run's, or of another encoder.
    """
    vision = run.model.vision
    assert vision is not None
    if folder is not None:
        if vision.encoder.kind is not EncoderKind.folder:
            raise ConfigError(
                f"--encoder {folder}: the model's encoder is no folder; its weights follow from run.seed.",
                "Leave --encoder out.",
            )
        vision = replace(vision, encoder=replace(vision.encoder, folder=str(folder)))
        run = replace(run, model=replace(run.model, vision=vision))
    require_encoder(vision.encoder)
    if vision.encoder.kind is EncoderKind.folder and known is not None:
        require_same_encoder(Path(vision.encoder.folder or ""), known)
    return run


def clip_of(given: str, beside: Path | None = None) -> Clip:
    """Of an argument: a file; files with commas between them, or a folder, whose images in the order of their names are
    the frames of a clip.

    Raises: DataError for a folder without images, for what the system refuses to look for, and for a URL.
    """
    root = beside or Path()
    path = root / given
    if given.startswith(("data:", "http://", "https://")):
        raise DataError(f"The image {_short(given)} is a URL.", "Save it as a file, and name that.")
    try:
        if path.is_dir():
            frames = sorted((file for file in path.iterdir() if is_image(file)), key=lambda file: by_number(file.name))
            if not frames:
                raise DataError(f"{path} has no images.", "Name a folder with the frames of a clip, or files.")
            return Clip(tuple(frames))
        if "," in given and not path.exists():
            return Clip(tuple(root / name for name in given.split(",")))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise _unreadable(path, error) from error
    return Clip((path,))


def clip_of_row(where: str, given: object, beside: Path) -> Clip:
    """As clip_of, of a row of jsonl: a text, or a list of files. Raises: DataError for anything else too."""
    if isinstance(given, str) and given:
        return clip_of(given, beside)
    if isinstance(given, list) and given and all(isinstance(name, str) and name for name in given):
        return Clip(tuple(beside / name for name in given))
    raise DataError(
        f"{where} has the image {given!r}.", 'Name a file, or the frames of a clip as a list: ["a.png", ["0.png"]].'
    )


def bytes_of_url(url: str) -> bytes:
    """Of a data: URL. Raises: DataError, without a name, for any other and for one that is damaged."""
    head, comma, content = url.partition(",")
    if not url.startswith("data:"):
        raise DataError("it is no data: URL, and nothing is fetched from an address",
                        "Send data:image/png;base64,...")  # fmt: skip
    if not comma or not head.endswith(";base64"):
        raise DataError("it is no data: URL in base64", "Send data:image/png;base64,...")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"its base64 is damaged ({error})", "Send data:image/png;base64,...") from error


def _bytes(path: Path) -> bytes:
    """Raises: DataError for what is no plain file, or cannot be read."""
    try:
        if not path.is_file():
            raise DataError(f"The image {path} is {'no plain file' if path.exists() else 'missing'}.", "Name a file.")
        if path.stat().st_size > FILE_LIMITS.max_bytes:
            raise DataError(f"The image {path} has {path.stat().st_size:,} bytes.", _cure(FILE_LIMITS))
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"The image {_short(str(path))} cannot be read: {error.strerror}.", "Name a file.")


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:60]}...{name[-60:]}"


def _decoded(name: str, data: bytes, size: int, limits: ImageLimits) -> Pixels:
    return _named(name, partial(decode, data, size, limits), limits)


def _named(name: str, read: Callable[[], T], limits: ImageLimits) -> T:
    """What `read` gives. Raises: DataError with the image's name, which that of data.pictures lacks."""
    try:
        return read()
    except DataError as error:
        raise DataError(f"{name} cannot be read as an image: {error.cause}.", _cure(limits)) from error


def _cure(limits: ImageLimits) -> str:
    return _CURE.format(limits.max_pixels, limits.max_bytes)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
