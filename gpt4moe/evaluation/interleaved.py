"""Documents with images of a data folder as pieces to score: each by itself, with its own images, as a run reads them.

What is longer than the context, or has more images than data.max_images, is split as data.long_rows=split does. An
image is decoded when its piece is scored; which images are equal is known from their files' hashes.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gpt4moe.config.data import LongRows
from gpt4moe.config.run import RunConfig
from gpt4moe.data.catalogue import Source
from gpt4moe.data.image_rows import ImageRows, ImageView, lay_out_images
from gpt4moe.data.rows import RowLayout
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.inference.pictures import Picture


def view_of(run: RunConfig) -> ImageView | None:
    """How images reach the run's model; None: it reads none."""
    vision = run.model.vision
    if vision is None:
        return None
    return ImageView(
        size=vision.encoder.image_size, max_frames=vision.resampler.max_frames, max_images=run.data.max_images
    )


def document_pieces(source: Source, view: ImageView, context_length: int, max_tokens: int | None) -> list[Piece]:
    """The held-out documents of a source, in their order.

    Args:
        max_tokens: about so many scored tokens, from its beginning; None: all.
    Raises: DataError for a damaged table, a clip with too many frames, and when there is no document.
    """
    layout = RowLayout(
        seq_length=context_length, seed=0, is_packed=False, long_rows=LongRows.split, padding_id=0
    )  # fmt: skip
    rows = lay_out_images(source, "valid", view, layout)
    found: list[Piece] = []
    scored = 0
    for index in np.argsort(rows.pieces.starts, kind="stable").tolist():
        if max_tokens is not None and scored >= max_tokens:
            break
        ((_, stretch),) = rows.stretches(index)
        tokens = rows.tokens[stretch]
        if len(tokens) > 1:
            found.append(Piece(tokens, len(tokens) - 1, _pictures(rows, tokens, stretch)))
            scored += int(np.count_nonzero(tokens[1:] != rows.image_id))
    return found


def text_parts(tokens: Sequence[int] | Any, image_id: int) -> list[list[int]]:
    """Of what stands between the images of a document; without those that are empty."""
    array = np.asarray(tokens)
    parts = np.split(array, np.flatnonzero(array == image_id))
    bare = [part[part != image_id].tolist() for part in parts]
    return [part for part in bare if part]


def _pictures(rows: ImageRows, tokens: Any, stretch: slice) -> tuple[Picture, ...]:
    made = []
    for place, numbers in rows.clips(tokens, stretch):
        digest = hashlib.sha256(b"".join(rows.store.sha256(int(number)) for number in numbers)).hexdigest()
        made.append(Picture(place, digest, partial(rows.pixels, numbers)))
    return tuple(made)
