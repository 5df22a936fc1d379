"""A sample of a source before it is read: its first documents here and there, the same at every start."""

from collections.abc import Iterator, Sequence

from gpt4moe.corpus.inputs import Inputs, cut
from gpt4moe.corpus.records import TO_UTF8, Notes, Part, read_part
from gpt4moe.errors import DataError

_PLACES, _PLACE_BYTES = 16, 1 << 14
"""A sample: tokenizers, at 3 MB/s, takes a tenth of a second for it."""
_TRAINING_PLACES = 256


def sample_of(inputs: Inputs, field: str) -> list[str]:
    """Documents, cut at 16 KiB, of 16 places. Raises: DataError as read_part, and for a source without a document."""
    notes = Notes()
    found = [text for _, text in _spread(inputs, field, _PLACES, _PLACE_BYTES, notes)]
    if not found:
        skipped = ", ".join(f"{count} files {reason}" for reason, count in sorted(notes.skipped.items()))
        named = ", ".join(path for path, _ in inputs.roots)
        raise DataError(
            f"{named}: there is no document to be found ({skipped or 'no text'}).",
            f"Give files with text. Those that are Latin-1: {TO_UTF8}." if skipped else "Give files with text.",
        )
    return found


def texts_to_train_on(inputs: dict[str, Inputs], field: str, num_bytes: int) -> Iterator[str]:
    """About num_bytes of text to train a tokenizer on, every source by its size."""
    total = sum(found.num_bytes for found in inputs.values())
    for found in inputs.values():
        share = num_bytes * found.num_bytes // max(1, total)
        yield from (
            text for _, text in _spread(found, field, _TRAINING_PLACES, max(1, share // _TRAINING_PLACES), Notes())
        )


def _spread(inputs: Inputs, field: str, places: int, place_bytes: int, notes: Notes) -> Iterator[tuple[int, str]]:
    """Place and text: the first documents of `places` stretches of the inputs, more of each where there are fewer."""
    size = max(1, inputs.num_bytes // places)
    pieces = cut(inputs, size)
    chosen = pieces if len(pieces) <= places else [pieces[i * len(pieces) // places] for i in range(places)]
    for number, piece in enumerate(chosen):
        yield from ((number, text) for text in _first(piece, field, max(place_bytes * places // len(chosen), 1), notes))


def _first(piece: Sequence[Part], field: str, num_bytes: int, notes: Notes) -> Iterator[str]:
    for part in piece:
        for text, data, _ in read_part(part, field, lambda amount: None, notes):
            if not text:
                continue
            yield text if len(data) <= num_bytes else text[:num_bytes]
            num_bytes -= len(data)
            if num_bytes <= 0:
                return
