"""A source of several shards is one stream; a flipped bit is found when its block is first read."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gpt4moe.data import blocks as blocks_module
from gpt4moe.data import shards as shards_module
from gpt4moe.data.blocks import BLOCK_BYTES, INDEX_BLOCK_BYTES
from gpt4moe.data.indexed import HEADER
from gpt4moe.data.indexed_writer import write_index
from gpt4moe.data.loader import build_data
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.preprocess import write_split
from gpt4moe.data.shards import ShardedTokens, describe
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError
from tests.data.conftest import make_folder, small_run

TEXTS = [f"document {i} of {i * i} other things\n" * (1 + i % 4) for i in range(300)]
MANY = 300_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def shards(folder: Path, tokenizer: Tokenizer) -> list[Shard]:
    """About six, of three blocks or more. Do not damage them."""
    return write_split(folder / "train", TEXTS * 16, tokenizer, lambda amount: None, shard_bytes=3 * BLOCK_BYTES)


@pytest.fixture(scope="module")
def expected(tokenizer: Tokenizer) -> list[int]:
    return [token for text in TEXTS * 16 for token in (*tokenizer.encode(text), tokenizer.eos_id)]


def test_shards_end_with_the_document_that_passes_their_size(shards: list[Shard]) -> None:
    assert len(shards) > 4
    assert [shard.file for shard in shards] == [f"train-{i:05}" for i in range(len(shards))]
    for shard in shards[:-1]:
        assert 3 * BLOCK_BYTES <= 2 * shard.tokens < 3 * BLOCK_BYTES + 1000


def test_megatron_reads_every_shard(folder: Path, shards: list[Shard], expected: list[int]) -> None:
    read = [IndexedDataset(str(folder / shard.file)) for shard in shards]
    assert [len(dataset) for dataset in read] == [shard.documents for shard in shards]
    assert np.concatenate([dataset[i] for dataset in read for i in range(len(dataset))]).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_stretch_is_that_of_the_stream(
    folder: Path, shards: list[Shard], expected: list[int], data: st.DataObject
) -> None:
    tokens = ShardedTokens(folder, shards)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert len(tokens) == len(expected)
    assert tokens[start:stop].tolist() == expected[start:stop]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_in_any_stretch_documents_begin_behind_an_eos(
    folder: Path, shards: list[Shard], expected: list[int], tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokens = ShardedTokens(folder, shards)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, min(len(expected), start + 3 * shards[0].tokens)))
    behind_eos = [place == 0 or expected[place - 1] == tokenizer.eos_id for place in range(start, stop)]
    assert tokens.begins(slice(start, stop)).tolist() == behind_eos


def test_an_index_of_other_data_is_found_when_documents_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = write_split(tmp_path / "train", TEXTS, tokenizer, lambda amount: None)
    write_split(tmp_path / "other", ["more", *TEXTS[1:]], tokenizer, lambda amount: None)
    (tmp_path / "train-00000.idx").write_bytes((tmp_path / "other-00000.idx").read_bytes())
    with pytest.raises(DataError, match=r"train-00000.idx is of other data: it has 300 documents"):
        ShardedTokens(tmp_path, [shard]).begins(slice(0, 10))


def as_an_older_tool_wrote(folder: Path, shard: Shard, to: Path) -> Shard:
    """A copy without the sums of the index."""
    for suffix in ("bin", "idx", "sums"):
        shutil.copyfile(folder / f"{shard.file}.{suffix}", to / f"{shard.file}.{suffix}")
    sums = to / shard.sums
    sums.write_bytes(sums.read_bytes()[: -4 * shard.idx_blocks])
    return replace(shard, idx_blocks=0)


def test_an_index_without_sums_is_hashed_once_however_often_it_is_mapped(
    folder: Path, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of thousands of shards map one after the other anew: hashing would read all of each index every time."""
    hashed, of_module = [], shards_module.file_sha256
    monkeypatch.setattr(shards_module, "_MOST_MAPPED", 1)
    monkeypatch.setattr(shards_module, "file_sha256", lambda path: (hashed.append(path.name), of_module(path))[1])
    older, new = [as_an_older_tool_wrote(folder, shard, tmp_path) for shard in shards], ShardedTokens(folder, shards)
    tokens = ShardedTokens(tmp_path, older)
    for _ in range(3):
        for end in tokens.ends:
            stretch = slice(end - 9, end)
            assert tokens.begins(stretch).tolist() == new.begins(stretch).tolist()
    assert hashed == [f"{shard.file}.idx" for shard in shards]
    path = tmp_path / f"{older[0].file}.idx"
    path.write_bytes(path.read_bytes()[:50] + b"?" + path.read_bytes()[51:])
    with pytest.raises(DataError, match="its sha256 is not the manifest's"):
        ShardedTokens(tmp_path, older).begins(slice(0, 9))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shard]:
    """A shard of 300,000 documents of one token."""
    path = tmp_path_factory.mktemp("large") / "train-00000"
    path.with_suffix(".bin").write_bytes(bytes(2 * MANY))
    write_index(path.with_suffix(".idx"), np.ones(MANY, dtype=np.int64), np.dtype("<u2"))
    sums = path.with_suffix(".sums")
    return path.parent, describe(path, sums, file=path.name, documents=MANY, tokens=MANY, dtype="uint16")


def test_a_few_blocks_of_a_large_index_are_read(large: tuple[Path, Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    """18 halvings look at a document's bound and its offset; the last nine of each lie in a block or two."""
    folder, shard = large
    summed: list[int] = []
    counted = SimpleNamespace(crc32=lambda data: (summed.append(len(data)), zlib.crc32(data))[1])
    monkeypatch.setattr(blocks_module, "zlib", counted)
    tokens = ShardedTokens(folder, [shard])
    for _ in range(2):
        assert tokens.begins(slice(200_000, 200_003)).all()
        assert shard.idx_blocks == -(-shard.idx_bytes // INDEX_BLOCK_BYTES) > 1400
        assert 10 < len(summed) <= 2 * 11 + 3 and max(summed) == INDEX_BLOCK_BYTES


@pytest.mark.parametrize("document", [7, 20_000, 200_001, MANY - 1])
@pytest.mark.parametrize("array_at", [HEADER.size + 4 * MANY, HEADER.size + 12 * MANY], ids=["offset", "bound"])
def test_a_flipped_bit_of_an_index_is_found_where_it_is_read(
    large: tuple[Path, Shard], tmp_path: Path, array_at: int, document: int
) -> None:
    folder, shard = large
    for suffix in ("bin", "sums"):
        (tmp_path / f"train-00000.{suffix}").hardlink_to(folder / f"train-00000.{suffix}")
    content = bytearray((folder / "train-00000.idx").read_bytes())
    content[array_at + 8 * document] ^= 4
    (tmp_path / "train-00000.idx").write_bytes(content)
    for stretch in (slice(document, document + 1), slice(0, MANY)):
        with pytest.raises(DataError, match=r"train-00000.idx is (damaged: bytes|of other data)"):
            ShardedTokens(tmp_path, [shard]).begins(stretch)
    if document == 20_000:  # what is read far from it is as it was written
        assert ShardedTokens(tmp_path, [shard]).begins(slice(200_000, 200_003)).all()


def test_a_place_is_found_in_its_shard(folder: Path, shards: list[Shard]) -> None:
    tokens = ShardedTokens(folder, shards)
    first = shards[0].tokens
    assert tokens.place(0) == (shards[0], 0)
    assert tokens.place(first - 1) == (shards[0], first - 1)
    assert tokens.place(first) == (shards[1], 0)
    assert tokens.place(len(tokens) - 1) == (shards[-1], shards[-1].tokens - 1)


def test_nothing_is_before_the_first_token(folder: Path, shards: list[Shard]) -> None:
    """An index of numpy would count from the end."""
    with pytest.raises(IndexError, match="tokens -3 to 1 of"):
        ShardedTokens(folder, shards).read_into(-3, np.empty(4, dtype=np.int64), np.empty(4, dtype=np.int64))


def test_only_shards_that_are_read_are_opened(
    folder: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    of_numpy = np.memmap
    monkeypatch.setattr(np, "memmap", lambda path, **rest: (opened.append(Path(path).name), of_numpy(path, **rest))[1])
    tokens = ShardedTokens(folder, shards)
    assert opened == []
    tokens[shards[0].tokens :][:1]
    assert "train-00000.bin" not in opened
    opened.clear()
    ShardedTokens(folder, shards)[10:20]
    assert opened == ["train-00000.bin", "train-00000.sums"]


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_a_flipped_bit_is_found_where_it_is_read_and_nowhere_else(
    tmp_path: Path, tokenizer: Tokenizer, block: int
) -> None:
    (shard,) = write_split(tmp_path / "train", TEXTS * 3, tokenizer, lambda amount: None)
    path, at = tmp_path / "train-00000.bin", block * BLOCK_BYTES + 12_346 * (block < 3)
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    per_block, num_blocks = BLOCK_BYTES // 2, -(-len(content) // BLOCK_BYTES)
    tokens = ShardedTokens(tmp_path, [shard])
    for other in range(num_blocks):
        stretch = slice(other * per_block, min((other + 1) * per_block, shard.tokens))
        if other == block:
            with pytest.raises(DataError, match=f"bytes {block * BLOCK_BYTES:,} to") as refusal:
                tokens[stretch]
            assert "train-00000.bin" in refusal.value.cause
        else:
            tokens[stretch]


def test_a_damaged_source_stops_a_run_that_reads_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = make_folder(tmp_path, tokenizer)
    path = folder / "alpha" / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    stream = build_data(small_run(folder, "+data.sources.alpha=1")).train
    with pytest.raises(DataError, match="is damaged"):
        stream.micro_batches(0, global_batch_size=4, micro_batch_size=4, dp=1, dp_index=0)
    build_data(small_run(folder, "+data.sources.beta=1")).train.sample(0)


def test_shards_of_any_size_give_the_same_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Loading, shuffling and cutting know nothing of shards."""
    found = []
    for name, shard_bytes in (("one", 10**9), ("many", 200)):
        folder = make_folder(tmp_path / name, tokenizer, shard_bytes=shard_bytes)
        data = build_data(small_run(folder))
        found.append([stream.sample(n).tokens.tobytes() for stream in (data.train, data.validation) for n in range(50)])
    assert len(SourceManifest.read(tmp_path / "many" / "alpha").train) > 3
    assert found[0] == found[1]
