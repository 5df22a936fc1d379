"""Documents with images as samples: packed into rows of S tokens, with each row's images and what may look at which.

    documents, their images --rows.py--> rows --row()--> tokens, documents, media; images read, decoded, resized

    tokens     I a a I b | I c c c | d d I e        I: an image token, never a label to learn
    media      1 1 1 2 2   3 3 3 3   0 0 4 4        within a document alone: the latest image at or before each token

Row n is a function of the seed and n. It is made where batches are made, in the prefetch thread: no image is decoded in
the thread that trains. A rank that does not encode a row's images asks for it without pixels: nothing is decoded then.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.data import LongRows
from gpt4moe.data.catalogue import Source
from gpt4moe.data.image_files import FrameStream, ImageStore
from gpt4moe.data.pictures import decode
from gpt4moe.data.rows import PackedRows, Pieces, RowLayout, bounds_of, documents_of, pack, require_pieces, shuffled
from gpt4moe.data.samples import TokenSample
from gpt4moe.data.shards import ShardedTokens
from gpt4moe.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageView:
    """How images reach a model."""

    size: int
    """Pixels, of both sides."""
    max_frames: int
    """Of an image."""
    max_images: int
    """Of a row; a clip is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRows(PackedRows):
    """One split of a source with images, laid out in rows."""

    frames: FrameStream
    store: ImageStore
    image_id: int
    view: ImageView
    num_images: int
    """Of all rows."""

    def summary(self) -> str:
        """For a person."""
        return f"{self.fullness('documents')}; {self.num_images:,} images"

    def row(self, index: int, *, pixels: bool = True) -> TokenSample:
        """Raises: DataError for an image that is damaged, where pixels are asked for, and for frames that are not those
        of the tokens."""
        sample = self.laid_out(index)
        media: NDArray[np.int32] = np.zeros(self.layout.seq_length, dtype=np.int32)
        images: list[NDArray[np.uint8]] = []
        frames: list[int] = []
        for at, stretch in self.stretches(index):
            length = stretch.stop - stretch.start
            media[at : at + length] = 0
            for place, numbers in self.clips(sample.tokens[at : at + length], stretch):
                frames.append(len(numbers))
                if pixels:
                    images.append(self.pixels(numbers))
                media[at + place :] = len(frames)
            media[at + length :] = 0
        is_tag = sample.tokens[1:] == self.image_id
        loss_mask = np.where(is_tag, np.float32(0), sample.loss_mask)
        return replace(sample, loss_mask=loss_mask, media=media, image_frames=tuple(frames), images=tuple(images))

    def clips(self, tokens: NDArray[np.int64], stretch: slice) -> list[tuple[int, NDArray[np.uint64]]]:
        """Of each image of a stretch with these tokens: its token, counted from the stretch's first, and the numbers of
        its frames. Raises: DataError for frames that are not those of the tokens."""
        records = self.frames.between(stretch.start, stretch.stop)
        places, first = np.unique(records["token"].astype(np.int64), return_index=True)
        self._require_same(tokens, places, stretch)
        return list(zip(places.tolist(), np.split(records["image"], first)[1:], strict=True))

    def pixels(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """[frames, side, side, 3] RGB. Raises: DataError for an image that is damaged."""
        return np.stack([self._decoded(int(number)) for number in numbers])

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        data = self.store.read(number)
        try:
            return decode(data, self.view.size)
        except DataError as error:
            raise DataError(
                f"{self.store.where(number)} cannot be decoded: {error.cause}.",
                "Make the source again without it (tools/prepare_media.py).",
            ) from error

    def _require_same(self, tokens: NDArray[np.int64], places: NDArray[np.int64], stretch: slice) -> None:
        if not np.array_equal(np.flatnonzero(tokens == self.image_id), places):
            raise DataError(
                f"{self.frames.folder}: tokens {stretch.start:,} to {stretch.stop - 1:,} have other image tokens than "
                "the frames that were written for them.",
                "Make the source again (tools/prepare_media.py).",
            )


def lay_out_images(source: Source, split: str, view: ImageView, layout: RowLayout) -> ImageRows:
    """Raises: DataError for a missing file, a document that is too long or has too many images and must not, a clip
    with too many frames, and when none is left."""
    assert source.manifest.images is not None
    seq_length, long_rows = layout.seq_length, layout.long_rows
    tokens, frames, image_id = source.tokens(split), source.frames(split), source.manifest.images.image_id
    tags, frame_counts = frames.tokens_and_lengths()
    _require_few_frames(source, split, frame_counts, view)
    whole = documents_of(tokens)
    is_long = (whole.lengths > seq_length + 1) | (_images_of(whole, tags) > view.max_images)
    num_long, num_left_out = int(is_long.sum()), 0
    if num_long and long_rows is LongRows.refuse:
        raise _too_long(source, split, whole, tags, seq_length, view)
    pieces = whole.of(np.flatnonzero(~is_long))
    if num_long:
        long = whole.of(np.flatnonzero(is_long))
        parts, num_left_out = _parts(long, tokens, tags, image_id, seq_length, view.max_images, long_rows)
        pieces = Pieces(np.append(pieces.starts, parts.starts), np.append(pieces.lengths, parts.lengths))
        pieces = pieces.of(np.argsort(pieces.starts, kind="stable"))
    require_pieces(pieces, whole, layout, source.name, f"{split} document")
    pieces = pieces.of(shuffled(pieces, layout.seed, source.name))
    images = _images_of(pieces, tags)
    most = seq_length + 1
    rows = pack(pieces.lengths, most, images, view.max_images) if layout.is_packed else np.arange(len(pieces.starts))
    return ImageRows(
        tokens=tokens, pieces=pieces.of(np.argsort(rows, kind="stable")), bounds=bounds_of(rows), layout=layout,
        num_long=num_long, num_left_out=num_left_out, frames=frames,
        store=source.images(split), image_id=image_id, view=view, num_images=int(images.sum()),
    )  # fmt: skip


def _images_of(pieces: Pieces, tags: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many image tokens each piece has."""
    ends = np.searchsorted(tags, pieces.starts + pieces.lengths)
    return (ends - np.searchsorted(tags, pieces.starts)).astype(np.int64)


def _parts(
    long: Pieces, tokens: ShardedTokens, tags: NDArray[np.int64], image_id: int, seq_length: int, max_images: int,
    long_rows: LongRows,
) -> tuple[Pieces, int]:  # fmt: skip
    """Parts of at most seq_length + 1 tokens and max_images images; how many without a learned token were left out.

    A part does not end with image tokens: the text that is said of them stands in the next part, which they begin.
    Parts that are cut within a text share a token, as samples of a stream do.
    """
    starts, lengths, left_out = [], [], 0
    for start, length in zip(long.starts.tolist(), long.lengths.tolist(), strict=True):
        at, end = start, start + length
        while at < end:
            stop = min(end, at + seq_length + 1)
            first = int(np.searchsorted(tags, at))
            if first + max_images < len(tags):
                stop = min(stop, int(tags[first + max_images]))
            last = stop
            if stop < end:
                is_tag = tokens[slice(at, stop)] == image_id
                texts = np.flatnonzero(~is_tag)
                last = at + int(texts[-1]) + 1 if texts.size else at
            is_learned = (tokens[slice(at + 1, last)] != image_id).any() if last > at + 1 else False
            if is_learned:
                starts.append(at)
                lengths.append(last - at)
            else:
                left_out += 1
            if long_rows is LongRows.cut or stop == end:
                break
            # After a text that the number of tokens ended, its last token is read again, to predict the next one.
            is_text_cut = last == stop and stop == at + seq_length + 1
            at = max(at + 1, last - 1 if is_text_cut else last)
    return Pieces(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)), left_out


def _require_few_frames(source: Source, split: str, counts: NDArray[np.int64], view: ImageView) -> None:
    num = int((counts > view.max_frames).sum())
    if num:
        raise DataError(
            f"Source {source.name}: {num:,} of {len(counts):,} {split} clips have more frames than "
            f"model.vision.resampler.max_frames={view.max_frames}; the longest has {int(counts.max()):,}.",
            f"Set model.vision.resampler.max_frames={int(counts.max())}, or make the source of fewer frames.",
        )


def _too_long(
    source: Source, split: str, whole: Pieces, tags: NDArray[np.int64], seq_length: int, view: ImageView
) -> DataError:
    images = _images_of(whole, tags)
    long, full = int((whole.lengths > seq_length + 1).sum()), int((images > view.max_images).sum())
    told, cures = [], []
    if long:
        told.append(f"{long:,} have more tokens than the context, model.seq_length={seq_length} + 1 (the longest has "
                    f"{int(whole.lengths.max()):,})")  # fmt: skip
        cures.append(f"model.seq_length={int(whole.lengths.max()) - 1} where the model can")
    if full:
        told.append(f"{full:,} have more images than data.max_images={view.max_images} (at most {int(images.max()):,})")
        cures.append(f"data.max_images={int(images.max())} where memory can")
    return DataError(
        f"Source {source.name}: of {len(whole.lengths):,} {split} documents {', and '.join(told)}.",
        f"Set data.long_rows=cut or split, or {' and '.join(cures)}.",
    )
