"""Documents with images in rows: each token looks at the latest image of its own document, and at no other's."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt4moe.config.data import LongRows
from gpt4moe.data.catalogue import Catalogue, Source
from gpt4moe.data.image_rows import ImageRows, ImageView, lay_out_images
from gpt4moe.data.rows import RowLayout, documents_of, pack
from gpt4moe.data.samples import TokenSample
from gpt4moe.errors import DataError
from gpt4moe.media.source import MediaFiles, write_media_source
from tests.media.conftest import image, write_lines

SEQ_LENGTH, SIZE = 48, 8
VIEW = ImageView(size=SIZE, max_frames=3, max_images=4)
Text = str | int | list[int]
"""A text, an image of a colour, a clip."""


def folder_of(folder: Path, tokenizer_path: Path, documents: Sequence[Sequence[Text]], **options: Any) -> Source:
    """A source of documents, written as lines with tags."""
    rows = []
    for parts in documents:
        images = [[part] if isinstance(part, int) else part for part in parts if not isinstance(part, str)]
        names = [[f"{number}.png" for number in frames] for frames in images]
        text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        rows.append({"text": text, "images": names})
        for name in {name for frames in names for name in frames}:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(image(int(name[:-4])))
    path = write_lines(folder / "a.jsonl", rows)
    files = MediaFiles(train=[path], valid=[path])
    write_media_source(folder / "data", "web", files, tokenizer_path, token="<image>", **options)
    return Catalogue.open([folder / "data"]).sources["web"]


def documents(count: int) -> list[list[Text]]:
    """Document n has one to three images, of the colours 3 n, 3 n + 1, 3 n + 2; the last may be a clip."""
    found: list[list[Text]] = []
    for n in range(count):
        parts: list[Text] = [f"a{n} ", 3 * n, " b" * (n % 5 + 1)]
        parts += [3 * n + 1, f" c{n}"] if n % 2 else []
        parts += [[3 * n + 2, 3 * n], " d"] if n % 3 == 0 else []
        found.append(parts[1:] if n % 4 == 0 else parts)
    return found


@pytest.fixture(scope="module")
def source(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return folder_of(tmp_path_factory.mktemp("rows") / "a", tokenizer_path, documents(40), shard_bytes=300)


def laid_out(source: Source, split: str = "train", *, seed: int = 1, **options: Any) -> ImageRows:
    view = options.pop("view", VIEW)
    settings: dict[str, Any] = {"seq_length": SEQ_LENGTH, "is_packed": True, "long_rows": LongRows.refuse}
    return lay_out_images(source, split, view, RowLayout(seed=seed, padding_id=0, **{**settings, **options}))


def rows_of(rows: ImageRows) -> Iterator[TokenSample]:
    return (rows.row(index) for index in range(rows.num_rows))


def colours(sample: TokenSample) -> list[list[int]]:
    """The colour of each frame of each image: its number."""
    return [[int(frame[0, 0, 0]) for frame in frames] for frames in sample.images]


def parts_of_row(sample: TokenSample) -> Iterator[slice]:
    """The inputs of each document of a row."""
    assert sample.documents is not None and sample.num_tokens is not None
    starts = np.flatnonzero(np.diff(sample.documents, prepend=-1))
    for start, stop in pairwise([*starts[starts < sample.num_tokens].tolist(), sample.num_tokens]):
        yield slice(start, stop)


def test_every_token_looks_at_the_latest_image_of_its_own_document_alone(source: Source) -> None:
    rows, seen = laid_out(source), []
    for sample in rows_of(rows):
        assert sample.media is not None and sample.documents is not None
        number = 0
        for part in parts_of_row(sample):
            before = number
            for place in range(part.start, part.stop):
                number += int(sample.tokens[place] == rows.image_id)
                assert sample.media[place] == (number if number > before else 0)
            shown = colours(sample)[before:number]
            assert len({frame // 3 for frames in shown for frame in frames}) == 1, "images of one document"
            seen.append(shown)
        assert number == len(sample.images) and not sample.media[sample.num_tokens :].any()
        assert all(frames.shape[1:] == (SIZE, SIZE, 3) for frames in sample.images)
    wanted = [[[part] if isinstance(part, int) else part for part in parts if not isinstance(part, str)]
              for parts in documents(40)]  # fmt: skip
    assert sorted(seen) == sorted(wanted)


def learned(rows: ImageRows) -> list[int]:
    return sorted(token for row in rows_of(rows) for token in row.tokens[1:][row.loss_mask > 0].tolist())


def test_all_text_is_learned_once_packed_or_not_but_no_image_and_no_first_token(source: Source) -> None:
    packed, padded = laid_out(source), laid_out(source, is_packed=False)
    assert padded.num_rows == 40 > 2 * packed.num_rows
    assert learned(packed) == learned(padded) and packed.image_id not in learned(packed)
    stream = source.tokens("train")[:]
    firsts = documents_of(source.tokens("train")).starts
    text = np.delete(stream, firsts)
    assert learned(packed) == sorted(text[text != packed.image_id].tolist())
    assert all(row.documents is None for row in rows_of(padded))
    assert "40 documents in" in packed.summary() and packed.summary().endswith(f"{packed.num_images} images")


def test_no_row_has_more_images_than_it_may(source: Source) -> None:
    views = {most: dataclasses.replace(VIEW, max_images=most) for most in (3, 4, 100)}
    counts = {most: [len(row.images) for row in rows_of(laid_out(source, view=view))] for most, view in views.items()}
    assert max(counts[3]) == 3 and max(counts[4]) == 4 < max(counts[100])
    assert sum(counts[3]) == sum(counts[100]) and len(counts[3]) > len(counts[100])
    lengths = np.random.default_rng(1).integers(2, 70, size=500)
    images = np.random.default_rng(2).integers(0, 4, size=500)
    rows = pack(lengths, 100, images, 5)
    assert np.bincount(rows, weights=lengths).max() <= 100 and np.bincount(rows, weights=images).max() == 5
    np.testing.assert_array_equal(pack(lengths, 100), pack(lengths, 100, np.zeros(500, dtype=int), 1))


LONG: list[list[Text]] = [
    ["x " * 60, 1, " one" * 30, 2, " two"],
    [1, 2, 3, 4, 5, 6, " six", 7, " seven"],
    [1, " a", 2, " b", 3, " c", 4, " d", 5, " e", 6, " f"],
    ["y " * (SEQ_LENGTH - 2), 7, " z" * 20],
]


def test_a_long_document_is_refused_cut_or_split_by_key(tokenizer_path: Path, tmp_path: Path) -> None:
    made = folder_of(tmp_path / "a", tokenizer_path, [*documents(6), *LONG])
    with pytest.raises(DataError, match=r"of 10 train documents 2 have more tokens than the context.* and 2 have more "
                                        r"images than data.max_images=4 \(at most 7\)"):  # fmt: skip
        laid_out(made)
    cut, split = (laid_out(made, long_rows=how) for how in (LongRows.cut, LongRows.split))
    assert cut.num_long == split.num_long == 4
    for rows in (cut, split):
        for row in rows_of(rows):
            assert len(row.images) <= 4 and len(row.tokens) == SEQ_LENGTH + 1
            for part in parts_of_row(row):
                tags = row.tokens[part] == rows.image_id
                assert not tags[-1] or part.stop == SEQ_LENGTH, "no part ends with an image"
    short = laid_out(folder_of(tmp_path / "b", tokenizer_path, documents(6)))
    whole = laid_out(made, seq_length=400, view=dataclasses.replace(VIEW, max_images=10), is_packed=False)
    assert len(learned(short)) < len(learned(cut)) < len(learned(split))
    assert learned(split) == learned(whole), "every text token of a split document is learned once"


def test_a_part_of_a_split_document_starts_with_the_images_that_its_text_follows(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    made = folder_of(tmp_path / "a", tokenizer_path, [LONG[1], LONG[2]])
    rows = laid_out(made, long_rows=LongRows.split, is_packed=False)
    assert sorted(colours(row) for row in rows_of(rows)) == sorted([
        [[3], [4], [5], [6]], [[7]],  # " six" with the four images before it; then " seven"
        [[1], [2], [3], [4]], [[5], [6]],
    ])  # fmt: skip


def test_too_many_frames_are_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    made = folder_of(tmp_path / "a", tokenizer_path, [[[0, 1, 2, 3], " a"], [[1, 2], " b"]])
    with pytest.raises(DataError, match=r"1 of 2 train clips have more frames than .*max_frames=3; the longest has 4"):
        laid_out(made)


def test_the_rows_are_a_function_of_the_seed(source: Source) -> None:
    def said(seed: int) -> list[bytes]:
        return [row.tokens.tobytes() + b"".join(frames.tobytes() for frames in row.images)
                for row in rows_of(laid_out(source, seed=seed))]  # fmt: skip

    assert said(1) == said(1) != said(2)


def test_frames_of_other_tokens_are_found(tokenizer_path: Path, tmp_path: Path) -> None:
    made = folder_of(tmp_path / "a", tokenizer_path, documents(6))
    images = made.manifest.images
    assert images is not None
    swapped = dataclasses.replace(images, image_id=images.image_id + 1)
    other = Source(made.name, made.folder, dataclasses.replace(made.manifest, images=swapped))
    with pytest.raises(DataError, match="have other image tokens than the frames"):
        next(rows_of(laid_out(other)))


def test_an_image_that_cannot_be_decoded_is_named_by_source_shard_and_number(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt4moe.media.examine.examine", lambda data, limits: (8, 6))  # as another Pillow might
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "b.png").write_bytes(image(2)[:-30])
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x<image>y<image>z", "images": ["a.png", "b.png"]}])
    write_media_source(
        tmp_path / "data", "web", MediaFiles(train=[path], valid=[path]), tokenizer_path, token="<image>"
    )
    rows = laid_out(Catalogue.open([tmp_path / "data"]).sources["web"])
    with pytest.raises(DataError, match=r"web/train-images-00000\.img: image 1 cannot be decoded: it is not whole"):
        rows.row(0)
