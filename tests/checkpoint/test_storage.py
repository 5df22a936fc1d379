"""One file: hashes are of what was written, a changed bit is found where it is read, any library opens it."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file

from gpt4moe.checkpoint import writing
from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.checkpoint.storage import FileEntry, Piece, VerifiedFile, block_bytes_for
from gpt4moe.checkpoint.writing import write_file
from gpt4moe.errors import HEADER, MISSING, SIZE, CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from tests.checkpoint.builders import flip_bit, piece

BLOCK = 64  # bytes
ARRAY = np.arange(100, dtype=np.float32).reshape(10, 10)  # 400 bytes: seven blocks, the last one short


@pytest.fixture
def entry(tmp_path: Path) -> FileEntry:
    return write_file(tmp_path / "x.safetensors", [piece("weight/a", ARRAY, (0, 0), (10, 10))], BLOCK)


def opened(folder: Path, entry: FileEntry, cache_bytes: int = 10**6) -> VerifiedFile:
    return VerifiedFile(folder, entry, BlockCache(cache_bytes))


def test_hashes_are_of_the_header_and_of_every_block_of_data(tmp_path: Path, entry: FileEntry) -> None:
    written = (tmp_path / "x.safetensors").read_bytes()
    data = written[entry.header_bytes :]
    assert entry.size == len(written)
    assert data == ARRAY.tobytes()
    assert entry.header_hash == xxhash.xxh3_64_hexdigest(written[: entry.header_bytes])
    assert entry.block_hashes == [xxhash.xxh3_64_hexdigest(data[at : at + BLOCK]) for at in range(0, 400, BLOCK)]


def test_blocks_that_pieces_straddle_are_hashed_as_one_stream(tmp_path: Path) -> None:
    rows = [piece("weight/a", ARRAY, (row, 0), (1, 10)) for row in range(10)]
    entry = write_file(tmp_path / "x.safetensors", rows, BLOCK)
    data = ARRAY.tobytes()
    assert entry.block_hashes == [xxhash.xxh3_64_hexdigest(data[at : at + BLOCK]) for at in range(0, 400, BLOCK)]


def test_the_safetensors_library_opens_the_file(tmp_path: Path, entry: FileEntry) -> None:
    (name,) = (loaded := load_file(tmp_path / "x.safetensors"))
    assert name == "weight/a@0,0"
    np.testing.assert_array_equal(loaded[name], ARRAY)


def test_bf16_and_strided_values_are_stored_as_fp32_in_c_order(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()
    entry = write_file(tmp_path / "x.safetensors", [Piece("weight/a", (3, 2), (0, 0), (3, 2), values)])
    assert opened(tmp_path, entry).read_floats(0, 6).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("start", "end"), [(0, 4), (60, 68), (63, 65), (64, 128), (0, 400), (10, 390), (396, 400)])
def test_any_range_of_bytes_is_read(tmp_path: Path, entry: FileEntry, start: int, end: int) -> None:
    assert opened(tmp_path, entry).read(start, end).tobytes() == ARRAY.tobytes()[start:end]


@pytest.mark.parametrize("byte", [0, 63, 64, 383, 399])
def test_a_flipped_bit_is_found_when_its_block_is_read_and_named(tmp_path: Path, entry: FileEntry, byte: int) -> None:
    flip_bit(tmp_path / "x.safetensors", entry.header_bytes + byte)
    file, block = opened(tmp_path, entry), byte // BLOCK
    with pytest.raises(CheckpointError, match=rf"Block {block} of .*x\.safetensors is damaged"):
        file.read(byte, byte + 1)
    assert [f"Block {block} " in problem for problem in file.problems()] == [True]


def test_a_partial_read_is_verified_without_the_rest(tmp_path: Path, entry: FileEntry) -> None:
    flip_bit(tmp_path / "x.safetensors", entry.header_bytes + 399)
    file = opened(tmp_path, entry)
    assert file.read(0, 100).tobytes() == ARRAY.tobytes()[:100]
    assert len(file.cache.blocks) == 2


def test_a_flipped_bit_of_the_header_is_found(tmp_path: Path, entry: FileEntry) -> None:
    flip_bit(tmp_path / "x.safetensors", 9)
    with pytest.raises(DamagedCheckpoint, match="The header of") as error:
        opened(tmp_path, entry).header()
    assert error.value.place == (entry.name, HEADER)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"F32"', b'"F99"'), (b"a@0,0", b"a@9,0"), (b"[0, 400]", b"[0, 404]"),
        (b'[10, 10], "data_offsets": [0, 400]', b'[ 9, 10], "data_offsets": [2, 362]'),  # a number over two blocks
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_damaged_for_every_reader(
    right: bytes, wrong: bytes, tmp_path: Path, entry: FileEntry
) -> None:
    """Its hash is right: a reader of another node that compares hashes would call it whole."""
    path = tmp_path / entry.name
    written = path.read_bytes()
    assert right in written
    path.write_bytes(written := written.replace(right, wrong))
    forged = dataclasses.replace(entry, header_hash=xxhash.xxh3_64_hexdigest(written[: entry.header_bytes]))
    with pytest.raises(DamagedCheckpoint, match="is none that was written here") as error:
        opened(tmp_path, forged).pieces()
    assert error.value.place is None


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused_before_anything_is_read(tmp_path: Path, entry: FileEntry, change: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((path.read_bytes() + b"x")[: entry.size + change])
    cause = f"has {entry.size + change} bytes, its manifest says {entry.size}"
    with pytest.raises(DamagedCheckpoint, match=cause) as error:
        opened(tmp_path, entry)
    assert error.value.place == (entry.name, SIZE)


def test_a_missing_file_is_refused(tmp_path: Path, entry: FileEntry) -> None:
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing") as error:
        opened(tmp_path, entry)
    assert error.value.place == (entry.name, MISSING)


def test_a_file_is_asked_for_its_size_when_open(
    tmp_path: Path, entry: FileEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may answer stat with the size of a file that was still being written."""
    before = os.stat_result((0o100644, *[0] * 9))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: before)
    assert (tmp_path / entry.name).stat().st_size == 0
    assert list(opened(tmp_path, entry).problems()) == []


def test_a_big_file_is_synced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sync at its end would look like a disk that stands still."""
    synced, sizes = os.fdatasync, []

    def sync(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        synced(file)

    monkeypatch.setattr(writing, "_SYNC_BYTES", 2 * BLOCK)
    monkeypatch.setattr(os, "fdatasync", sync)
    entry = write_file(tmp_path / "x.safetensors", [piece("weight/a", ARRAY, (0, 0), (10, 10))], BLOCK)
    assert sizes == [entry.header_bytes + 2 * BLOCK * number for number in (1, 2, 3)]
    assert list(opened(tmp_path, entry).problems()) == []


def test_the_cache_of_all_files_stays_within_its_bytes(tmp_path: Path) -> None:
    cache = BlockCache(3 * BLOCK)
    for name in ("x", "y"):
        entry = write_file(tmp_path / name, [piece("weight/a", ARRAY, (0, 0), (10, 10))], BLOCK)
        file = VerifiedFile(tmp_path, entry, cache)
        for at in range(0, 400, 4):
            file.read(at, at + 4)
            assert cache.cached_bytes == sum(block.nbytes for block in cache.blocks.values()) <= 3 * BLOCK
    assert [index for _, index in cache.blocks] == [4, 5, 6]


def test_a_rank_without_anything_to_write_writes_a_whole_file(tmp_path: Path) -> None:
    entry = write_file(tmp_path / "x.safetensors", [])
    assert opened(tmp_path, entry).header() == {"__metadata__": {"shapes": "{}"}}
    assert entry.block_hashes == [] and load_file(tmp_path / "x.safetensors") == {}


def test_blocks_are_16_to_64_mib() -> None:
    assert [block_bytes_for(size) >> 20 for size in (0, 2**30, 8 * 2**30)] == [16, 16, 64]


@pytest.mark.parametrize("change", [{"block_hashes": []}, {"block_bytes": 0}, {"header_bytes": 2**62}])
def test_hashes_that_are_not_those_of_all_blocks_are_refused(
    tmp_path: Path, entry: FileEntry, change: dict[str, Any]
) -> None:
    """A manifest with no hash at all would let `verify` call anything whole."""
    with pytest.raises(DamagedCheckpoint, match="hashes for the") as error:
        opened(tmp_path, dataclasses.replace(entry, **change))
    assert error.value.place is None, "the manifest's own hash is right"


def test_a_disk_that_cannot_read_is_no_damage_and_its_node_is_named(tmp_path: Path) -> None:
    """Linux answers EIO to whoever reads the first page of its own memory."""
    (tmp_path / "x.safetensors").symlink_to("/proc/self/mem")
    entry = FileEntry(name="x.safetensors", size=0, header_bytes=16, header_hash="", block_bytes=BLOCK, block_hashes=[])
    with pytest.raises(UnreadableCheckpoint) as error:
        opened(tmp_path, entry).check(-1)
    path, node = tmp_path / "x.safetensors", os.uname().nodename
    assert error.value.cause == f"The header of {path} cannot be read on {node}: Input/output error."
    assert (error.value.folder, error.value.place, error.value.number) == (tmp_path, (path.name, -1), errno.EIO)
