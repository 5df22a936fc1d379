"""A sample of a source before it is read: its first documents here and there, the same at every start."""

from collections.abc import Iterator, Sequence

from gpt4moe.corpus.inputs import Inputs, cut
from gpt4moe.corpus.records import Notes, Part, read_part
from gpt4moe.errors import DataError

_PLACES, _PLACE_BYTES = 16, 1 << 14
"""A sample: tokenizers, at 3 MB/s, takes a tenth of a second for it."""
_TRAINING_PLACES = 256


def sample_of(inputs: Inputs, field: str) -> list[str]:
    """Documents, cut at 16 KiB, of 16 places. Raises: DataError as read_part, and for a source without a document."""
    found = [text for _, text in _spread(inputs, field, _PLACES, _PLACE_BYTES)]
    if not found:
        raise DataError(
            f"{', '.join(path for path, _ in inputs.roots)}: there is no document to be found.", "Give files with text."
        )
    return found


def texts_to_train_on(inputs: dict[str, Inputs], field: str, num_bytes: int) -> Iterator[str]:
    """About num_bytes of text to train a tokenizer on, every source by its size."""
    total = sum(found.num_bytes for found in inputs.values())
    for found in inputs.values():
        share = num_bytes * found.num_bytes // max(1, total)
        yield from (text for _, text in _spread(found, field, _TRAINING_PLACES, max(1, share // _TRAINING_PLACES)))


def _spread(inputs: Inputs, field: str, places: int, place_bytes: int) -> Iterator[tuple[int, str]]:
    """Place and text: the first documents of `places` stretches of the inputs, more of each where there are fewer."""
    size = max(1, inputs.num_bytes // places)
    pieces = cut(inputs, size)
    chosen = pieces if len(pieces) <= places else [pieces[i * len(pieces) // places] for i in range(places)]
    for number, piece in enumerate(chosen):
        yield from ((number, text) for text in _first(piece, field, max(place_bytes * places // len(chosen), 1)))


def _first(piece: Sequence[Part], field: str, num_bytes: int) -> Iterator[str]:
    notes = Notes()
    for part in piece:
        for text, data, _ in read_part(part, field, lambda amount: None, notes):
            if not text:
                continue
            yield text if len(data) <= num_bytes else text[:num_bytes]
            num_bytes -= len(data)
            if num_bytes <= 0:
                return
