"""Whatever rectangles a checkpoint is cut into, any flat range of any shard reads as the array it is a part of."""

import random
from collections.abc import Iterable
from contextlib import nullcontext
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.checkpoint import filling, index
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.storage import StoredPiece, VerifiedFile
from gpt4moe.checkpoint.writing import write_file
from gpt4moe.errors import CheckpointError, DamagedCheckpoint
from gpt4moe.parallel.shard import Shard
from tests.checkpoint.builders import dealt, flat_ranges, flip_bit, manifest, piece, random_cut, state, write_checkpoint


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 2**32))
def test_any_flat_range_of_any_shard_equals_the_array(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], seed: int
) -> None:
    rng = random.Random(seed)
    array = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    folder = tmp_path_factory.mktemp("property") / "step-00000001"
    hands = dealt({"weight/a": array}, rng.randint(1, 3), cuts=rng.randint(0, 8), seed=seed)
    write_checkpoint(folder, hands, block_bytes=rng.choice((4, 12, 64)))
    reader = CheckpointReader(folder)
    for offset, size in random_cut(shape, 3, rng):
        flat = piece("weight/a", array, offset, size).values
        for start, end in flat_ranges(prod(size), 3, rng):
            out = torch.full((end - start,), torch.nan)
            reader.fill("weight/a", Shard("a", shape, offset, size), start, end, out)
            assert out.equal(flat[start:end])


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), data=st.data())
def test_runs_are_bounded_contiguous_and_the_box(shape: tuple[int, ...], data: st.DataObject) -> None:
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    end = [data.draw(st.integers(low + 1, n)) for low, n in zip(begin, shape, strict=True)]
    limit = data.draw(st.integers(1, 40))
    numbers = np.arange(prod(shape)).reshape(shape)
    found = []
    before, index.RUN_ELEMENTS = index.RUN_ELEMENTS, limit
    try:
        for at, size in index.runs(StoredPiece("x", (0,) * len(shape), shape, 0), begin, end):
            part = numbers[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))].reshape(-1)
            assert (np.diff(part) == 1).all()
            assert part.size <= limit
            found += part.tolist()
    finally:
        index.RUN_ELEMENTS = before
    box = numbers[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
    assert found == box.reshape(-1).tolist()


def test_a_whole_tensor_is_assembled_from_all_files(tmp_path: Path) -> None:
    arrays = state()
    write_checkpoint(tmp_path / "x", dealt(arrays, 3))
    reader = CheckpointReader(tmp_path / "x")
    assert reader.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.tensor(name).numpy(), array)
    assert list(reader.problems()) == []


def test_values_are_cast_to_the_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", dealt(state(), 1))
    reader = CheckpointReader(tmp_path / "x")
    out = torch.empty(11, dtype=torch.bfloat16)
    reader.fill("weight/c.norm", Shard("c.norm", (11,), (0,), (11,)), 0, 11, out)
    assert out.equal(reader.tensor("weight/c.norm").bfloat16())


def test_blocks_are_read_to_their_places_and_checked_there(tmp_path: Path) -> None:
    """Not into a buffer first, whose pages and copies would take as long again as reading."""
    array = np.arange(150, dtype=np.float32).reshape(15, 10)  # 600 bytes: nine blocks and a short one
    (entry,) = write_checkpoint(tmp_path / "x", [[piece("weight/a", array, (0, 0), (15, 10))]], block_bytes=64)
    reader = CheckpointReader(tmp_path / "x")
    assert reader.tensor("weight/a").numpy().tolist() == array.tolist()
    assert not reader.cache.blocks
    some = torch.empty(70)  # whole rows from the middle of block 1 to that of block 6
    reader.fill("weight/a", Shard("a", (15, 10), (0, 0), (15, 10)), 30, 100, some)
    assert some.tolist() == array.reshape(-1)[30:100].tolist()
    flip_bit(tmp_path / "x" / entry.name, entry.header_bytes + 64 * 4 + 3)
    with pytest.raises(DamagedCheckpoint, match=r"Block 4 of .* is damaged") as error:
        reader.tensor("weight/a")
    assert error.value.place == (entry.name, 4)


def test_bytes_of_a_block_that_nobody_wants_are_checked_too(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.float32)
    (entry,) = write_checkpoint(tmp_path / "x", [[piece("weight/a", array, (0,), (64,))]], block_bytes=128)
    shard = Shard("a", (64,), (0,), (64,))
    for byte in (0, 127):  # before and behind the wanted ones of block 0
        flip_bit(tmp_path / "x" / entry.name, entry.header_bytes + byte)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(DamagedCheckpoint, match=r"Block 0 of .* is damaged"):
                CheckpointReader(tmp_path / "x").fill("weight/a", shard, 5, 20, torch.empty(15, dtype=dtype))
        flip_bit(tmp_path / "x" / entry.name, entry.header_bytes + byte)


def test_parts_of_a_block_may_overlap(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.float32)
    write_checkpoint(tmp_path / "x", [[piece("weight/a", array, (0,), (64,))]])
    ranges = ((0, 40), (3, 64), (3, 64))
    targets = [("weight/a", Shard("a", (64,), (0,), (64,)), *ends, torch.empty(ends[1] - ends[0])) for ends in ranges]
    CheckpointReader(tmp_path / "x").fill_all(targets)
    for _, _, start, end, out in targets:
        assert out.tolist() == array[start:end].tolist()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_torch_has_its_threads_again_after_a_load(tmp_path: Path, *, is_damaged: bool) -> None:
    (entry,) = write_checkpoint(tmp_path / "x", [[piece("weight/a", np.ones(64, np.float32), (0,), (64,))]])
    if is_damaged:
        flip_bit(tmp_path / "x" / entry.name, entry.size - 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(DamagedCheckpoint) if is_damaged else nullcontext():
            CheckpointReader(tmp_path / "x").tensor("weight/a")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_many_tensors_are_filled_in_one_pass_over_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors share blocks, in files of different block sizes; targets are cast, strided in the file, or twice the
    same: whichever way a block takes, it is read once."""
    arrays = state()
    hands = dealt(arrays, 3, cuts=6)
    folder = tmp_path / "x"
    folder.mkdir()
    sizes = zip(hands, (64, 256, 128), strict=True)
    entries = [write_file(folder / f"{rank}.safetensors", *given) for rank, given in enumerate(sizes)]
    manifest(files=entries).save(folder)
    read = []
    read_block = VerifiedFile.read_block

    def counted(file: VerifiedFile, index: int, places: Iterable[tuple[int, np.ndarray]]) -> None:
        read.append((file.entry.name, index))
        read_block(file, index, places)

    monkeypatch.setattr(VerifiedFile, "read_block", counted)
    for most_places, doubled in ((64, False), (2, False), (64, True)):
        monkeypatch.setattr(filling, "MOST_PLACES", most_places)
        reader = CheckpointReader(folder)
        wanted = [(name, torch.bfloat16 if "exp_avg" in name else torch.float32) for name in reader.shapes]
        wanted = 2 * wanted if doubled else wanted
        targets = []
        for name, dtype in wanted:
            shard = Shard(name, arrays[name].shape, (0,) * arrays[name].ndim, arrays[name].shape)
            targets.append((name, shard, 0, shard.size, torch.full((shard.size,), torch.nan, dtype=dtype)))
        read.clear()
        reader.fill_all(targets)
        for name, _, _, _, out in targets:
            assert out.equal(torch.from_numpy(arrays[name]).view(-1).to(out.dtype)), name
        blocks = [(entry.name, index) for entry in entries for index in range(len(entry.block_hashes))]
        assert sorted(set(read)) == sorted(blocks)
        assert doubled or sorted(read) == sorted(blocks)


def test_opening_reads_headers_alone(tmp_path: Path) -> None:
    entries = write_checkpoint(tmp_path / "x", dealt(state(), 2))
    for entry in entries:
        flip_bit(tmp_path / "x" / entry.name, entry.size - 1)
    reader = CheckpointReader(tmp_path / "x")
    assert not reader.cache.blocks
    assert len(list(reader.problems())) == 2


def test_missing_slices_are_refused_on_reading_and_found_by_problems(tmp_path: Path) -> None:
    hands = dealt(state(), 1)
    lost = hands[0].pop(4)
    write_checkpoint(tmp_path / "x", hands)
    reader = CheckpointReader(tmp_path / "x")
    with pytest.raises(CheckpointError, match=rf"{prod(lost.shape)} of {prod(lost.global_shape)} elements .* missing"):
        reader.tensor(lost.tensor)
    (problem,) = reader.problems()
    assert problem == f"{lost.tensor}: {prod(lost.shape)} of {prod(lost.global_shape)} elements are missing"


def test_another_shape_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", dealt(state(), 1))
    reader = CheckpointReader(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"a\.weight is \[7, 5\], the model needs \[7, 6\]"):
        reader.fill("weight/a.weight", Shard("a.weight", (7, 6), (0, 0), (7, 6)), 0, 42, torch.empty(42))
    with pytest.raises(CheckpointError, match="no tensor weight/z"):
        reader.tensor("weight/z")


def test_a_slice_in_two_files_is_found(tmp_path: Path) -> None:
    hands = dealt(state(), 2)
    hands[1].append(hands[0][2])
    write_checkpoint(tmp_path / "x", hands)
    (problem,) = CheckpointReader(tmp_path / "x").problems()
    assert problem.startswith(f"{hands[0][2].tensor}: the pieces at ") and problem.endswith("overlap")


def test_data_that_no_header_lists_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", dealt(state(), 1))
    reader = CheckpointReader(tmp_path / "x")
    name, lost = next((name, pieces[0]) for name, pieces in reader.pieces.items() if len(pieces) > 1)
    reader.pieces[name].remove(lost)
    missing, unlisted = reader.problems()
    assert name in missing
    assert f"its header lists {reader.files[lost.file].data_bytes - 4 * prod(lost.shape)}" in unlisted


def test_a_doubled_slice_does_not_make_up_for_a_missing_one(tmp_path: Path) -> None:
    arrays = {"weight/a": np.arange(8, dtype=np.float32)}
    top = piece("weight/a", arrays["weight/a"], (0,), (4,))
    write_checkpoint(tmp_path / "x", [[top], [top]])
    with pytest.raises(CheckpointError, match=r"weight/a: the pieces at .* overlap"):
        CheckpointReader(tmp_path / "x").tensor("weight/a")
