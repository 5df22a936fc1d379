"""Megatron's .bin/.idx: written by its builder, read by ours and by Megatron's own to the same tokens."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from benchmarks.harness.process import peak_bytes, reset_peak
from gpt4moe.data.indexed import DocumentIndex, IndexedTokens
from gpt4moe.data.indexed_writer import write_index
from gpt4moe.data.preprocess import write_split
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]


def written(folder: Path, vocab_size: int = 300) -> Path:
    prefix = folder / "books-train"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(300, 2), (100_000, 4)])
def test_megatrons_files_are_read_token_by_token(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    ours = IndexedTokens(written(tmp_path, vocab_size))
    assert ours.tokens.itemsize == itemsize
    assert [ours.document(i).tolist() for i in range(ours.num_documents)] == DOCUMENTS
    assert ours.tokens.tolist() == [token for document in DOCUMENTS for token in document]


def test_a_token_is_found_in_its_document(tmp_path: Path) -> None:
    index = IndexedTokens(written(tmp_path)).index
    assert [index.document_at(token) for token in range(12)] == [
        (number, place) for number, document in enumerate(DOCUMENTS) for place in range(len(document))
    ]
    for first in range(12):
        for last in range(first, 13):
            assert index.starts(first, last).tolist() == [start for start in (0, 4, 6) if first <= start < last]


def test_a_large_index_leaves_its_pages_out_of_the_process(tmp_path: Path) -> None:
    """Also while the table is made: 4 million documents have 64 MB of pages."""
    write_index(tmp_path / "a.idx", np.full(4_000_000, 1000), np.dtype("<i4"))
    index = DocumentIndex(tmp_path / "a")
    before = reset_peak()
    while "_landmarks" not in vars(index):  # the first stretches are found by halving
        assert index.starts(500_000_100, 500_002_000).tolist() == [500_001_000]
    assert index.starts(500_000_100, 500_002_000).tolist() == [500_001_000]
    assert peak_bytes() - before < 40e6
    (row,) = [row for row in psutil.Process().memory_maps() if row.path == str(tmp_path / "a.idx")]
    # What a look into two places maps is up to the kernel, 2 MB each.
    assert row.rss < 8e6 < row.size


def test_halving_and_the_table_find_the_same_documents(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(0, 4, 70_000) * np.random.default_rng(2).integers(0, 2, 70_000)
    write_index(tmp_path / "a.idx", lengths, np.dtype("<u2"))
    expected = np.cumsum(lengths) - lengths
    for first, last in ((0, 1), (0, 0), (17, 900), (50_000, 50_003), (int(lengths.sum()) - 5, int(lengths.sum()))):
        index = DocumentIndex(tmp_path / "a")
        for has_table in (False, False, True):
            found = index.starts(first, last).tolist()
            assert found == expected[(expected >= first) & (expected < last)].tolist()
            assert ("_landmarks" in vars(index)) is has_table


def test_documents_without_tokens_are_passed_over(tmp_path: Path) -> None:
    prefix = tmp_path / "gaps"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for lengths in ([], [2], [], [1, 2], []):
        builder.add_document(torch.arange(sum(lengths)), lengths)
    builder.finalize(f"{prefix}.idx")
    index = IndexedTokens(prefix).index
    assert [index.document_at(token) for token in range(5)] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    assert sorted(set(index.starts(0, 5).tolist())) == [0, 2]
    assert index.starts(3, 5).tolist() == []


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    prefix = tmp_path / "chat"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(f"{prefix}.idx")
    ours = IndexedTokens(prefix)
    assert [ours.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4, 5], [6]]


def test_what_we_write_megatron_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["def f(x):\n    return x\n", "naïve café ☕\n", "a" * 500]
    (facts,) = write_split(tmp_path / "train", texts, tokenizer, lambda amount: None)
    theirs, ours = IndexedDataset(str(tmp_path / "train-00000")), IndexedTokens(tmp_path / "train-00000")
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    assert [ours.document(i).tolist() for i in range(3)] == expected
    assert (facts.documents, facts.tokens) == (3, ours.num_tokens)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_to_be_restored(tmp_path: Path, suffix: str) -> None:
    prefix = written(tmp_path)
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=f"{suffix} is missing") as refusal:
        IndexedTokens(prefix)
    assert "Restore it from its original" in refusal.value.cure


@pytest.mark.parametrize(("suffix", "keep"), [(".bin", 10), (".bin", 0), (".idx", 50), (".idx", 20), (".idx", 0)])
def test_a_cut_file_is_found_out(tmp_path: Path, suffix: str, keep: int) -> None:
    prefix = written(tmp_path)
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"is damaged"):
        IndexedTokens(prefix)


def test_a_file_of_another_kind_is_found_out(tmp_path: Path) -> None:
    prefix = written(tmp_path)
    Path(f"{prefix}.idx").write_bytes(b"PK" * 100)
    with pytest.raises(DataError, match="no Megatron index"):
        IndexedTokens(prefix)
