"""Items with images -> a source of a data folder: tokens of whole documents, images, and what was left out.

FOLDER/<source>/train-00000.bin .idx .sums .frames       a document is a text with image tokens, and EOS
FOLDER/<source>/train-images-00000.img .table            the images' own bytes, each distinct one once
FOLDER/<source>/bad_images.jsonl, skipped.jsonl          images and documents left out, with the reason; 10,000 at most
FOLDER/<source>.bad_images.jsonl                         the same list where there are too many of them, and no source
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.data.folder import (
    LISTED,
    LeftOut,
    finish_folder,
    held_out,
    new_source,
    require_both_splits,
    require_source_name,
    vocabulary_of,
)
from gpt4moe.data.image_files import ImageWriter, write_frames
from gpt4moe.data.image_tokens import encode_parts, image_id_of
from gpt4moe.data.indexed_writer import SHARD_BYTES, ShardWriter, token_dtype
from gpt4moe.data.manifest import FrameTable, ImageFiles, SourceManifest
from gpt4moe.data.pictures import ImageLimits
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import DataError
from gpt4moe.media.examine import Examined, examined
from gpt4moe.media.inputs import BadItem, items

BAD_FILE, SKIPPED_FILE = "bad_images.jsonl", "skipped.jsonl"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFiles:
    """What a source is made of."""

    train: Sequence[Path]
    valid: Sequence[Path] = ()
    """Empty: a share of `train` is held out, by the first image of each document: copies of it are in one split."""
    images: Path | None = None
    """Folder of the images that lines name; None: beside each file."""
    held_out_share: float = 0.01
    licence: str = "unknown"
    skips_bad_rows: bool = False
    """Bad lines are left out and listed. False: they are an error."""
    max_bad_share: float = 0.01
    """Of images. Up to so many bad ones are left out and listed; more are an error."""
    limits: ImageLimits = ImageLimits()  # noqa: RUF009  # frozen
    workers: int = 2


@dataclass(kw_only=True, slots=True)
class SplitCount:
    """Of one split."""

    documents: int = 0
    tokens: int = 0
    images: int = 0
    """Image tokens; a clip is one."""
    frames: int = 0
    distinct: int = 0
    """Images that are stored."""
    image_bytes: int = 0
    longest: int = 0
    """Tokens of a document."""
    most_images: int = 0
    """Of a document."""
    most_frames: int = 0
    """Of an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaCount:
    """Of a source."""

    splits: dict[str, SplitCount] = field(default_factory=lambda: {"train": SplitCount(), "valid": SplitCount()})
    bad: LeftOut = field(default_factory=LeftOut)
    """BadImage of the images that were left out."""
    skipped: LeftOut = field(default_factory=LeftOut)
    """{"where", "reason", "cure"} of the documents that are none."""
    without_image: LeftOut = field(default_factory=LeftOut)
    """{"where", "reason"} of the documents none of whose images is whole."""

    @property
    def left_out(self) -> LeftOut:
        """All documents that were."""
        listed = [*self.skipped.listed, *self.without_image.listed][:LISTED]
        return LeftOut(self.skipped.count + self.without_image.count, listed)

    @property
    def facts(self) -> dict[str, Any]:
        splits = {split: asdict(one) for split, one in self.splits.items()}
        return splits | {"bad_images": self.bad.count, "skipped": self.left_out.count}


def write_media_source(
    folder: Path, name: str, files: MediaFiles, tokenizer_path: Path, *, token: str, vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda documents: None, shard_bytes: int = SHARD_BYTES,
) -> MediaCount:  # fmt: skip
    """Writes a source in place of an older one of its name.

    Args:
        token: of the tokenizer, that stands for an image.
        vocab_size: of the model, where it is larger than the tokenizer's.
        progress: called with the number of documents just read.
        shard_bytes: of tokens and of images.
    Raises: DataError for a bad line unless they are skipped, too many bad images, a split without a document, another
        tokenizer than the folder's, or one without the token. The older source stays then.
    """
    require_source_name(name)
    tokenizer = load_tokenizer(tokenizer_path)
    image_id = image_id_of(tokenizer, tokenizer_path, token)
    vocabulary = vocabulary_of(folder, tokenizer, tokenizer_path, vocab_size)
    listing, count = folder / f"{name}.{BAD_FILE}", MediaCount()
    listing.unlink(missing_ok=True)  # of an earlier call
    with new_source(folder / name) as new:
        dtype = token_dtype(vocabulary.vocab_size)
        splits = {split: _Split(new, split, dtype, shard_bytes) for split in count.splits}
        for paths, given in ((files.train, None), (files.valid, "valid")):
            for found in examined(items(paths, files.images, files.limits.max_bytes), files.limits, files.workers):
                progress(1)
                document = _whole(found, count)
                if document is not None:
                    split = given or _split_of(document, files)
                    tokens = _tokens(document, tokenizer, image_id)
                    splits[split].add(document, tokens, image_id)
                    _add(count.splits[split], document, len(tokens))
        _require_good(count, files, listing)
        require_both_splits(
            name, {split: one.documents for split, one in count.splits.items()}, "document",
            held_out_share=None if files.valid else files.held_out_share, left_out=count.left_out,
            other_cure=f", or name held-out files: --valid {name}=FILE",
        )  # fmt: skip
        for split, one in splits.items():
            one.finish()
            count.splits[split].distinct = sum(shard.images for shard in one.images.shards)
            count.splits[split].image_bytes = sum(shard.bytes for shard in one.images.shards)
        images = ImageFiles(
            token=token, image_id=image_id, shards={split: one.images.shards for split, one in splits.items()},
            frames={split: one.tables for split, one in splits.items()}, counts=count.facts,
        )  # fmt: skip
        count.bad.write(new / BAD_FILE)
        count.left_out.write(new / SKIPPED_FILE)
        SourceManifest(
            tokenizer_sha256=vocabulary.tokenizer_sha256, licence=files.licence,
            description=", ".join(path.name for path in (*files.train, *files.valid)),
            train=splits["train"].tokens.shards, valid=splits["valid"].tokens.shards, images=images,
        ).write(new)  # fmt: skip
    finish_folder(folder, vocabulary, tokenizer_path)
    return count


class _Split:
    """Shards of tokens, of images and tables of frames that are being written."""

    def __init__(self, folder: Path, split: str, dtype: "np.dtype[np.integer]", shard_bytes: int):
        self.shard_bytes = shard_bytes
        self.tokens = ShardWriter(folder / split, dtype)
        self.images = ImageWriter(folder / f"{split}-images", shard_bytes)
        self.frames = array("Q")
        """Place and image of each frame, one after the other."""
        self.tables: list[FrameTable] = []

    def add(self, found: Examined, tokens: "np.typing.NDArray[np.int64]", image_id: int) -> None:
        places = np.flatnonzero(tokens == image_id) + self.tokens.num_tokens
        for place, pictures in zip(places.tolist(), found.images, strict=True):
            for picture in pictures:
                self.frames.extend((place, self.images.add(picture.data, picture.size)))
        self.tokens.add(tokens)
        if self.tokens.num_bytes >= self.shard_bytes:
            self._close()

    def finish(self) -> None:
        if self.tokens.pair is not None:
            self._close()
        self.images.finish()

    def _close(self) -> None:
        self.tokens.close()
        shard = self.tokens.prefix.with_name(f"{self.tokens.shards[-1].file}.frames")
        self.tables.append(write_frames(shard, self.frames))
        self.frames = array("Q")


def _whole(found: Examined | BadItem, count: MediaCount) -> Examined | None:
    """A document to write; what is left out is noted."""
    if isinstance(found, BadItem):
        cause = found.error.cause
        reason = cause if cause.startswith(found.where) else f"{found.where}: {cause}"
        count.skipped.add(where=found.where, reason=reason, cure=found.error.cure)
        return None
    for one in found.bad:
        count.bad.add(**asdict(one))
    if not found.images:
        where = found.item.where
        count.without_image.add(where=where, reason=f"{where}: none of its images is whole.", is_of_images=True)
    return found if found.images else None


def _tokens(found: Examined, tokenizer: Tokenizer, image_id: int) -> "np.typing.NDArray[np.int64]":
    parts = [part if isinstance(part, str) else None for part in found.parts]
    return np.append(encode_parts(tokenizer, parts, image_id), tokenizer.eos_id)


def _split_of(found: Examined, files: MediaFiles) -> str:
    if files.valid:
        return "train"
    first = hashlib.sha256(found.images[0][0].data).digest()
    return "valid" if held_out(first, files.held_out_share) else "train"


def _add(count: SplitCount, found: Examined, num_tokens: int) -> None:
    lengths = [len(pictures) for pictures in found.images]
    count.documents += 1
    count.tokens += num_tokens
    count.images += len(lengths)
    count.frames += sum(lengths)
    count.longest = max(count.longest, num_tokens)
    count.most_images = max(count.most_images, len(lengths))
    count.most_frames = max(count.most_frames, *lengths)


def _require_good(count: MediaCount, files: MediaFiles, listing: Path) -> None:
    """Raises: DataError for bad lines unless they are skipped, and for too many bad images, which `listing` gets."""
    rows, bad = count.skipped, count.bad
    if rows.count and not files.skips_bad_rows:
        shown = " | ".join(one["reason"] for one in rows.listed[:_SHOWN])
        raise DataError(
            shown
            if rows.count == 1
            else f"{rows.count:,} documents are none: {shown}{' | ...' * (rows.count > _SHOWN)}",
            rows.listed[0]["cure"],
        )
    seen = sum(one.frames for one in count.splits.values()) + bad.count
    if bad.count > files.max_bad_share * seen:
        bad.write(listing)
        shown = " | ".join(f"{one['where']}: {one['image']}: {one['reason']}" for one in bad.listed[:_SHOWN])
        raise DataError(
            f"{bad.count:,} of {seen:,} images are bad ({bad.count / seen:.1%}), more than "
            f"{files.max_bad_share:.1%}: {shown}{' | ...' * (bad.count > _SHOWN)}",
            f"{listing} lists them. Mend them, or allow a larger share to be left out: --max-bad SHARE.",
        )
