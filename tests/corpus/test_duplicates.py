"""Of equal documents the first stays, with any number of buckets and pieces."""

from pathlib import Path

import numpy as np
import pytest

from gpt4moe.corpus.duplicates import KEY_BYTES, duplicate_key, mark_first


@pytest.mark.parametrize("bucket_documents", [16, 64, 1 << 21])
def test_the_first_of_equal_keys_stays(tmp_path: Path, bucket_documents: int) -> None:
    numbers = np.random.default_rng(1).integers(0, 300, 1000)
    keys = [duplicate_key(str(number), str(number).encode()) for number in numbers]
    pieces = [b"".join(keys[start : start + 130]) for start in range(0, 1000, 130)]
    mark_first(iter(pieces), 1000, tmp_path / "stays", bucket_documents=bucket_documents)
    seen: set[int] = set()
    first = [not (number in seen or seen.add(number)) for number in numbers.tolist()]
    assert np.fromfile(tmp_path / "stays", dtype=np.uint8).astype(bool).tolist() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stays"]


def test_a_text_that_fills_a_source_fills_no_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sorted at once is bounded: the text is in its bucket once for each piece."""
    sizes, read = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda path, dtype: (sizes.append(path.stat().st_size), read(path, dtype))[1])
    mark_first([duplicate_key("a", b"a") * 1000] * 5, 5000, tmp_path / "stays", bucket_documents=64)
    assert sizes == [5 * 24]
    assert read(tmp_path / "stays", dtype=np.uint8).nonzero()[0].tolist() == [0]


def test_white_space_and_the_form_of_accents_do_not_count_but_letters_do() -> None:
    def key(text: str) -> bytes:
        return duplicate_key(text, text.encode())

    assert key("a  b\n") == key("\ta b") and key("é") == key("e\u0301")
    assert key("a b") != key("ab") and key("A") != key("a") and len(key("")) == KEY_BYTES
